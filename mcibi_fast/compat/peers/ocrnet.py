"""OCRNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("object_context_block.",)
RENAMING = [
    *_blocks.projections(r"within_image\.attention", "object_context_block"),
    (r"^within_image\.fuse\.", "object_context_block.bottleneck."),
    (r"^decoder\.classifier\.", "decoder.1."),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, channels, and the width of the attention."""
    return _blocks.widths(state, "decoder.1.weight") | {
        "transform_channels": shape(state, "object_context_block.value_project.0.weight")[0],
    }
