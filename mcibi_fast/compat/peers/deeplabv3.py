"""DeepLabV3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks

MARKS = ("aspp_net.",)
RENAMING = [
    (r"^decoder\.conv\.branches\.", "aspp_net.parallel_branches."),
    (r"^decoder\.conv\.", "aspp_net."),
    (r"^decoder\.classifier\.", "decoder.1."),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and channels; the dilations are not shown."""
    return _blocks.widths(state, "decoder.1.weight")
