"""SETR with the decoder "pup"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks

FRAMEWORK = "setr"
MARKS = ("norm_layers.", "auxiliary_decoders.", "decoder.13.", "decoder.17.")
RENAMING = _blocks.upsampled(convs=4)


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and channels."""
    return _blocks.upsampled_options(state, "pup", "decoder.17.weight")
