"""CCNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("cca.",)
RENAMING = [
    *_blocks.attended("conv_before_cca", "cca", "conv_after_cca"),
    (r"^cca\.(query|key|value)\.", r"cca.\1_conv."),
    (r"^cca\.gamma$", "cca.gamma.scale"),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, channels, and the width of queries and keys."""
    channels, width = _blocks.widths(state), shape(state, "cca.query_conv.weight")[0]
    return channels | {"reduction": channels["feats_channels"] // width}
