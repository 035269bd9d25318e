"""SETR with multi-level aggregation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("mla_neck.",)
RENAMING = [
    (r"^norms\.", "mla_neck.norm_layers."),
    (r"^levels\.reduce\.", "mla_neck.mla.channel_proj."),
    (r"^levels\.extract\.", "mla_neck.mla.feat_extract."),
    (r"^levels\.up\.(\d+)\.0\.", r"up_convs.\1."),
    (r"^levels\.up\.(\d+)\.1\.0\.", r"up_convs.\1.3."),
    (r"^levels\.up\.(\d+)\.1\.1\.", r"up_convs.\1.4."),
    (r"^decoder\.classifier\.", "decoder.1."),
    *_blocks.upsampling(r"auxiliaries\.(\d+)", r"auxiliary_decoders.\1", convs=2),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and channels."""
    return {
        "num_classes": shape(state, "decoder.1.weight")[0],
        "mla_channels": shape(state, "mla_neck.mla.channel_proj.0.0.weight")[0],
        "up_channels": shape(state, "up_convs.0.0.weight")[0],
        "auxiliary_channels": shape(state, "auxiliary_decoders.0.0.weight")[0],
        "auxiliary_weight": 0.4,
    }
