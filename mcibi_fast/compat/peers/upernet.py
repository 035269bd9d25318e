"""UPerNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks

MARKS = ("ppm_net.", "lateral_convs.", "fpn_convs.")
RENAMING = [
    (r"^within_image\.pyramid\.", "ppm_net.branches."),
    (r"^within_image\.bottleneck\.", "ppm_net.bottleneck."),
    (r"^pyramid\.laterals\.", "lateral_convs."),
    (r"^pyramid\.outputs\.", "fpn_convs."),
    (r"^decoder\.conv\.", "decoder."),
    (r"^decoder\.classifier\.", "decoder.4."),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and channels."""
    return _blocks.widths(state)
