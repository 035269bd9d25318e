"""PSANet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("attention_p.", "reduce_p.")
RENAMING = [
    (r"^decoder\.conv\.collect\.(reduce|attention)\.", r"\1."),
    (r"^decoder\.conv\.distribute\.(reduce|attention)\.", r"\1_p."),
    (r"^decoder\.conv\.project\.", "proj."),
    *_blocks.fused(),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, channels, and the window, which is taken for a square."""
    side = math.isqrt(shape(state, "attention.3.weight")[0])
    return _blocks.widths(state) | {"mask_size": (side, side)}
