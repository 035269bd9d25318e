"""DeepLabV3+."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("aspp_net.", "shortcut.")
RENAMING = [
    (r"^within_image\.branches\.", "aspp_net.parallel_branches."),
    (r"^within_image\.", "aspp_net."),
    (r"^decoder\.conv\.", "decoder."),
    (r"^decoder\.classifier\.", "decoder.3."),
    *(
        (rf"^(aspp_net\.parallel_branches|decoder)\.(\d+)\.{i}\.{j}\.", rf"\1.\2.{part}_{kind}.")
        for i, part in enumerate(("depthwise", "pointwise"))
        for j, kind in enumerate(("conv", "bn"))
    ),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and channels; not the dilations."""
    return _blocks.widths(state, "decoder.3.weight") | {
        "shortcut_channels": shape(state, "shortcut.0.weight")[0],
    }
