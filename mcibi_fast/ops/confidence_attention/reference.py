"""Position-confidence attention, Eq. 13, general form: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def confidence_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale Q K^T) V, and the log-sum-exp of each query's scores.

    Args:
        query: (B, Nq, D).
        key: (B, Nk, D).
        value: (B, Nk, Dv).
        scale: what the scores are multiplied by.

    Returns:
        (B, Nq, Dv) in the dtype of the query; (B, Nq) in float32, float64 for float64,
        which has no gradient.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = scale * torch.einsum("bqd,bkd->bqk", query.to(dtype), key.to(dtype))
    P = torch.softmax(scores, dim=-1)
    out = torch.einsum("bqk,bkd->bqd", P, value.to(dtype))
    return out.to(query.dtype), torch.logsumexp(scores, dim=-1).detach()
