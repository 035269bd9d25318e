"""Attention in plain operators of PyTorch, in the dtype of the inputs.

It forms the scores. That is faster than ``scaled_dot_product_attention`` on CPUs that multiply
bfloat16, by up to 2 from about 128 pixels on, and for views of maps, which need no copy
(docs/speed-cpu.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcibi_fast.ops.measured import FORMED_FROM, FORMED_MOST, multiplies_bfloat16


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


def attention_and_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The same, and the log-sum-exp of each query's scores, (B, Nq), without a gradient."""
    scores = (scale * query) @ key.mT
    wide = torch.promote_types(scores.dtype, torch.float32)
    lse = torch.logsumexp(scores.detach().to(wide), -1)
    return torch.softmax(scores, -1) @ value, lse


def why_not(query: Tensor, key: Tensor, *_others: object) -> str | None:
    """Why these inputs have a better kernel, or None."""
    if not query.is_cpu:
        return f"a tensor is on {query.device.type}, not on cpu"
    scores = query.shape[0] * query.shape[1] * key.shape[1]
    if not FORMED_FROM <= scores <= FORMED_MOST:
        return f"{scores} scores; it pays off from {FORMED_FROM} on and forms at most {FORMED_MOST}"
    if query.dtype == torch.bfloat16:
        return None if multiplies_bfloat16() else "this CPU does not multiply bfloat16"
    if query.stride(2) == 1 and key.stride(2) == 1:
        return "rows in one piece in another dtype than bfloat16"
    return None
