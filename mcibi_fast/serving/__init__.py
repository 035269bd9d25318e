"""A web page on this machine that segments uploaded pictures: ``mcibi-fast serve``."""

from __future__ import annotations

from mcibi_fast.extras import require

require("mcibi_fast.serving", "PIL", "fastapi", "uvicorn")
