"""DNL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("dnl_block.",)
RENAMING = [
    *_blocks.attended("conv_before_dnl", "dnl_block", "conv_after_dnl"),
    (r"^dnl_block\.query\.", "dnl_block.theta.0."),
    (r"^dnl_block\.key\.", "dnl_block.phi.0."),
    (r"^dnl_block\.value\.", "dnl_block.g.0."),
    (r"^dnl_block\.output\.", "dnl_block.conv_out."),
    (r"^dnl_block\.salience\.", "dnl_block.conv_mask."),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, channels, and the width of the attention."""
    channels, width = _blocks.widths(state), shape(state, "dnl_block.g.0.weight")[0]
    return channels | {"reduction": channels["feats_channels"] // width}
