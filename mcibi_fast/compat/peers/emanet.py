"""EMANet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("ema_module.",)
RENAMING = [
    *_blocks.attended("ema_in_conv", "ema", "bottleneck"),
    (r"^ema\.project\.", "ema_mid_conv."),
    (r"^ema\.output\.", "ema_out_conv."),
    (r"^ema\.bases$", "ema_module.bases"),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, channels, and the number of bases."""
    return _blocks.widths(state) | {"bases": shape(state, "ema_module.bases", 3)[2]}
