"""DMNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks

MARKS = ("dcm_modules.",)
RENAMING = [
    (r"^decoder\.conv\.contexts\.(\d+)\.kernels\.", r"dcm_modules.\1.filter_gen_conv."),
    (r"^decoder\.conv\.contexts\.(\d+)\.reduce\.", r"dcm_modules.\1.input_redu_conv."),
    (r"^decoder\.conv\.contexts\.", "dcm_modules."),
    *_blocks.fused(),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and channels; not the sizes of the filters."""
    return _blocks.widths(state)
