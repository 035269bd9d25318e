"""Depthwise convolutions in full precision, where bfloat16 would make them slower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mcibi_fast.nn.swapping import Swapped, swap


class _InFullPrecision(Swapped):
    """Mixed into the class of a convolution: on a CPU it leaves autocast."""

    def forward(self: Any, x: Tensor) -> Tensor:
        forward = super().forward  # type: ignore[misc]
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return forward(x)
        with torch.autocast("cpu", enabled=False):
            y: Tensor = forward(x.float())
        # In the dtype that the operations around it have, so that they move half the bytes.
        return y.to(torch.get_autocast_dtype("cpu"))


def depthwise_in_float32(model: nn.Module) -> int:
    """Takes the depthwise convolutions of a model out of autocast on a CPU, in place.

    oneDNN's gradient of a depthwise convolution is two to five times slower in bfloat16 than in
    float32, on processors with AVX512-BF16 as well (torch 2.14; benchmarks/NOTES.md). Nothing
    changes without autocast or on another device. Names and values of the weights stay.

    Args:
        model: any module.

    Returns:
        The number of depthwise convolutions.
    """
    found = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
            swap(module, _InFullPrecision)
            found += 1
    return found
