"""SemanticFPN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks

MARKS = ("fpn_neck.", "scale_heads.")
OUTPUT_STRIDE = 32
RENAMING = [*_blocks.PYRAMID, (r"^decoder\.classifier\.", "decoder.1.")]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and channels; not the strides."""
    found = _blocks.widths(state, "decoder.1.weight")
    return {
        "num_classes": found["num_classes"],
        "sum_channels": found["feats_channels"],
        "pyramid_channels": _blocks.pyramid_channels(state),
    }
