"""ISANet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("global_relation.", "local_relation.")
RENAMING = [
    (r"^decoder\.conv\.before\.", "in_conv."),
    (r"^decoder\.conv\.(far|near)\.output\.", r"decoder.conv.\1.output_project."),
    *_blocks.projections(r"decoder\.conv\.far", "global_relation"),
    *_blocks.projections(r"decoder\.conv\.near", "local_relation"),
    (r"^decoder\.conv\.fuse\.", "out_conv."),
    (r"^decoder\.classifier\.", "decoder.1."),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, channels, and the width of the attentions; not the size of the blocks."""
    return _blocks.widths(state, "decoder.1.weight") | {
        "context_channels": shape(state, "global_relation.query_project.0.0.weight")[0],
    }
