"""APCNet."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from mcibi_fast.compat.peers import _blocks
from mcibi_fast.compat.shapes import shape

MARKS = ("acm_modules.",)
RENAMING = [
    (r"^decoder\.conv\.contexts\.(\d+)\.", r"acm_modules.\1."),
    (r"^(acm_modules\.\d+)\.reduce_regions\.", r"\1.pooled_redu_conv."),
    (r"^(acm_modules\.\d+)\.reduce\.", r"\1.input_redu_conv."),
    (r"^(acm_modules\.\d+)\.global_information\.", r"\1.global_info."),
    (r"^(acm_modules\.\d+)\.affinity\.", r"\1.gla."),
    (r"^(acm_modules\.\d+)\.residual\.", r"\1.residual_conv."),
    (r"^(acm_modules\.\d+)\.fuse\.", r"\1.fusion_conv."),
    *_blocks.fused(),
]


def options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, channels, and the regions of each context."""
    count = len({key.split(".")[1] for key in state if key.startswith("acm_modules.")})
    regions = [shape(state, f"acm_modules.{i}.gla.weight")[0] for i in range(count)]
    return _blocks.widths(state) | {"pool_scales": [isqrt(each) for each in regions]}
