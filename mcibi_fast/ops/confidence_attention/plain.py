"""Attention in plain operators of PyTorch, which form the scores.

On a CPU that is faster than ``scaled_dot_product_attention`` from about 128 pixels on in bfloat16,
if the CPU multiplies it, for views of maps, which need no copy, and with gradients
(docs/speed-cpu.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcibi_fast.ops import checks, measured
from mcibi_fast.ops.confidence_attention.sdpa import in_float32
from mcibi_fast.ops.measured import FORMED_CHANNELS, FORMED_FROM, FORMED_MOST


@in_float32
def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K^T) V.

    Args:
        query: (B, Nq, D).
        key: (B, Nk, D).
        value: (B, Nk, Dv).
        scale: what the scores are multiplied by.

    Returns:
        (B, Nq, Dv) in the dtype of the inputs.
    """
    return torch.softmax((scale * query) @ key.mT, -1) @ value


@in_float32
def attention_and_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The same, and the log-sum-exp of each query's scores, (B, Nq), without a gradient."""
    scores = (scale * query) @ key.mT
    wide = torch.promote_types(scores.dtype, torch.float32)
    lse = torch.logsumexp(scores.detach().to(wide), -1)
    return torch.softmax(scores, -1) @ value, lse


def why_not(query: Tensor, key: Tensor, value: Tensor, scale: float) -> str | None:
    """Why these inputs have a better kernel, or None."""
    if not query.is_cpu:
        return f"a tensor is on {query.device.type}, not on cpu"
    scores = query.shape[0] * query.shape[1] * key.shape[1]
    if not FORMED_FROM <= scores <= FORMED_MOST:
        return f"{scores} scores; it pays off from {FORMED_FROM} on and forms at most {FORMED_MOST}"
    if query.dtype == torch.bfloat16 and measured.multiplies(torch.bfloat16):
        return None
    wide = checks.wide(query.dtype)
    if query.dtype != wide and not measured.widens(query, key, value):
        return "rows in one piece in 16 bits without gradients"
    if query.stride(2) != 1 or key.stride(2) != 1:
        return None
    if wide == torch.float32 and measured.wants_gradient(query, key, value):
        channels = max(query.shape[2], value.shape[2])
        few = f"rows of {channels} channels; it pays off from {FORMED_CHANNELS} on"
        return few if channels < FORMED_CHANNELS else None
    return "rows in one piece without gradients"
