"""PSPNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks

MARKS = ("ppm_net.",)
RENAMING = [
    (r"^decoder\.conv\.pyramid\.", "ppm_net.branches."),
    (r"^decoder\.conv\.bottleneck\.", "ppm_net.bottleneck."),
    (r"^decoder\.classifier\.", "decoder.1."),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and channels."""
    return _blocks.widths(state, "decoder.1.weight")
