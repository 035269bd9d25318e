"""ANN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("afn_block.", "apn_block.")
RENAMING = [
    (r"^within_image\.fusion\.fuse\.", "afn_block.bottleneck."),
    (r"^within_image\.fusion\.", "afn_block.stages.0."),
    (r"^within_image\.reduce\.", "bottleneck."),
    (r"^within_image\.context\.fuse\.", "apn_block.bottleneck."),
    (r"^within_image\.context\.", "apn_block.stages.0."),
    (r"^(a.n_block\.stages\.0)\.(query|key|value)\.", r"\1.\2_project."),
    (r"^(a.n_block\.stages\.0)\.output\.", r"\1.out_project."),
    (r"^decoder\.classifier\.", "decoder.1."),
]
REPEATED = {"apn_block.stages.0.key_project.": "apn_block.stages.0.query_project."}


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, channels, and the width of the attentions."""
    width = shape(state, "afn_block.stages.0.value_project.weight")[0]
    return _blocks.widths(state, "decoder.1.weight") | {"context_channels": width}
