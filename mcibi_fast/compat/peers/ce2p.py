"""CE2P."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("edge_net.", "ppm_net.")
RENAMING = [
    *_blocks.POOLED,
    (r"^edges\.edge\.", "edge_net.edge_conv."),
    (r"^edges\.fuse\.", "edge_net.fuse_conv."),
    (r"^edges\.", "edge_net."),
    (r"^first\.", "decoder_stage1."),
    (r"^decoder\.", "decoder_stage2."),
    (r"^(decoder_stage\d)\.conv\.0\.", r"\1."),
    (r"^(decoder_stage\d)\.conv\.1\.0\.", r"\1.3."),
    (r"^(decoder_stage\d)\.conv\.1\.1\.", r"\1.4."),
    (r"^(decoder_stage\d)\.classifier\.", r"\1.7."),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and channels; not the slope of the activations."""
    return _blocks.widths(state, "decoder_stage2.7.weight") | {
        "shortcut_channels": shape(state, "shortcut.0.weight")[0],
        "edge_channels": shape(state, "edge_net.edge_conv.weight", 2)[1],
    }
