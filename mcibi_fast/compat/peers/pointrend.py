"""PointRend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks

MARKS = ("fpn_neck.", "scale_heads.", "fcs.")
OUTPUT_STRIDE = 32
RENAMING = [
    *_blocks.PYRAMID,
    (r"^decoder\.classifier\.", "auxiliary_decoder.1."),
    (r"^point_head\.layers\.", "fcs."),
    (r"^point_head\.classifier\.", "decoder.1."),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and channels; not the strides and the numbers of points."""
    found = _blocks.widths(state, "auxiliary_decoder.1.weight")
    return {
        "num_classes": found["num_classes"],
        "sum_channels": found["feats_channels"],
        "pyramid_channels": _blocks.pyramid_channels(state),
    }
