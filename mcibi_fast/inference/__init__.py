"""Predicts and evaluates images and videos, and exports models to files."""

from __future__ import annotations

from mcibi_fast.extras import require

require("mcibi_fast.inference", "PIL", "tqdm")
