"""Images and videos to predictions, scores and exported files."""

from __future__ import annotations

from mcibi_fast.extras import require

require("mcibi_fast.inference", "PIL", "tqdm")
