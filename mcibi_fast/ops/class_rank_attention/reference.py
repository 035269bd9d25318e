"""Position-confidence attention, Eq. 13, over class weights: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def class_rank_attention(
    query: Tensor, weights: Tensor, scale: float, hard: bool
) -> tuple[Tensor, Tensor]:
    """softmax(scale Q W^T) W, and the log-sum-exp of each query's scores.

    Args:
        query: Q, (B, N, K).
        weights: W, (B, N, K), keys and values in one.
        scale: what the scores are multiplied by.
        hard: each row of W counts as the one-hot vector of its largest entry, the first on ties.

    Returns:
        (B, N, K) in the dtype of the query; (B, N) in float32, float64 for float64, which has no
        gradient.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    Q = query.to(dtype)
    if hard:
        # N one-hot keys are K different ones, each counted as often as it occurs; P W is then P.
        classes = torch.arange(weights.shape[-1], device=weights.device)
        counts = (weights.argmax(-1, keepdim=True) == classes).sum(1, keepdim=True)
        scores = scale * Q + counts.to(dtype).log()
        out = torch.softmax(scores, dim=-1)
    else:
        W = weights.to(dtype)
        scores = scale * torch.einsum("bqk,bnk->bqn", Q, W)
        out = torch.einsum("bqn,bnk->bqk", torch.softmax(scores, dim=-1), W)
    return out.to(query.dtype), torch.logsumexp(scores, dim=-1).detach()
