"""Aggregation in plain operators of PyTorch: the softmax W and its product with the table.

On a CPU that is faster with gradients, for few pixels and a large table (docs/speed-cpu.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcibi_fast.ops import checks, measured
from mcibi_fast.ops.layout import layout


def aggregate(logits: Tensor, table: Tensor) -> Tensor:
    """C~_bi (Eq. 12), in the memory format of the kernels.

    Args:
        logits: (B, K, h, w).
        table: C_dl, (K, Z).

    Returns:
        (B, Z, h, w) in the logits' dtype, channels_last where the logits are and are not contiguous
        as well. Computed in float32, or float64 for float64.
    """
    B, K, h, w = logits.shape
    scores = logits.to(checks.wide(logits.dtype))
    table = table.to(scores.dtype)
    if layout(logits) == torch.contiguous_format:
        maps = torch.matmul(table.T, scores.flatten(2).softmax(1)).view(B, -1, h, w)
    else:
        rows = scores.permute(0, 2, 3, 1).reshape(B * h * w, K)
        maps = (rows.softmax(1) @ table).view(B, h, w, -1).permute(0, 3, 1, 2)
    return maps.to(logits.dtype)


def why_not(logits: Tensor, memory: Tensor, channels: int, noise: Tensor, hard: bool) -> str | None:
    """Why these operators cannot compute this, or None."""
    if not logits.is_cpu:
        return f"a tensor is on {logits.device.type}, not on cpu"
    return "hard weights have no product" if hard else None


def slower(logits: Tensor, memory: Tensor, channels: int, noise: Tensor, hard: bool) -> str | None:
    """Why the kernel is faster, or None where these operators are, as measured."""
    return measured.many_pixels(logits, channels)
