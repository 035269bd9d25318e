"""Training: the loop and what it is made of."""

from __future__ import annotations

from mcibi_fast.extras import require

require("mcibi_fast.training", "accelerate", "tensorboard", "tqdm")
