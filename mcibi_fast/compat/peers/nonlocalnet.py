"""NonLocal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("nl_block.",)
RENAMING = [
    *_blocks.attended("conv_before_nl", "nl_block", "conv_after_nl"),
    (r"^nl_block\.query\.", "nl_block.theta.0."),
    (r"^nl_block\.key\.", "nl_block.phi.0."),
    (r"^nl_block\.value\.", "nl_block.g.0."),
    (r"^nl_block\.output\.", "nl_block.conv_out."),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, channels, and the width of the attention."""
    channels, width = _blocks.widths(state), shape(state, "nl_block.g.0.weight")[0]
    return channels | {"reduction": channels["feats_channels"] // width}
