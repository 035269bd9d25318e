"""HTML reports and their figures."""

from __future__ import annotations

from mcibi_fast.extras import require

require("mcibi_fast.reports", "PIL", "matplotlib", "sklearn", "tqdm")
