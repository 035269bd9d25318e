"""Reports as HTML pages, and their pictures; one file per section of a page."""

from __future__ import annotations

from mcibi_fast.extras import require

require("mcibi_fast.reports", "PIL", "jinja2", "matplotlib", "sklearn", "tqdm")
