"""GCNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("contextblock_net.",)
RENAMING = [
    *_blocks.attended("conv_before_cb", "contextblock_net", "conv_after_cb"),
    (r"^contextblock_net\.salience\.", "contextblock_net.conv_mask."),
    (r"^contextblock_net\.transform\.", "contextblock_net.channel_add_conv."),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, channels, and the width of the block's bottleneck."""
    channels = _blocks.widths(state)
    width = shape(state, "contextblock_net.channel_add_conv.0.weight")[0]
    return channels | {"reduction": channels["feats_channels"] // width}
