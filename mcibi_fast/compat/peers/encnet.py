"""EncNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("enc_module.",)
RENAMING = [
    (r"^decoder\.conv\.before\.", "bottleneck."),
    (r"^decoder\.conv\.project\.", "enc_module.encoding_project."),
    (r"^decoder\.conv\.encoding\.", "enc_module.encoding.0."),
    (r"^decoder\.conv\.norm\.", "enc_module.encoding.1."),
    (r"^decoder\.conv\.gate\.", "enc_module.fc.0."),
    (r"^presence\.", "se_layer."),
    (r"^decoder\.classifier\.", "decoder.1."),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, channels, codewords, and whether there is a layer for the classes present."""
    found = _blocks.widths(state, "decoder.1.weight")
    found["num_codes"] = shape(state, "enc_module.encoding.0.codewords")[0]
    if "se_layer.weight" not in state:
        found["se_weight"] = 0.0
    return found
