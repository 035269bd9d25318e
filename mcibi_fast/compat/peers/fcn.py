"""FCN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks

MARKS = ("decoder.3.", "decoder.7.")
RENAMING = [
    (r"^decoder\.conv\.0\.", "decoder."),
    (r"^decoder\.conv\.1\.0\.", "decoder.3."),
    (r"^decoder\.conv\.1\.1\.", "decoder.4."),
    (r"^decoder\.classifier\.", "decoder.7."),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and channels."""
    return _blocks.widths(state, "decoder.7.weight") | {"convs": 2}
