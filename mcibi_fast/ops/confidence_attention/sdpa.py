"""``scaled_dot_product_attention`` as a backend of the attention ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from mcibi_fast.ops import measured
from mcibi_fast.ops.confidence_attention.reference import confidence_attention


def in_float32(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same attention, computed in float32 where that is faster (``measured.widens``)."""

    @functools.wraps(run)
    def widened(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Any:
        if not measured.widens(query, key, value):
            return run(query, key, value, scale)
        k = key.float()
        results = run(query.float(), k, k if value is key else value.float(), scale)
        if isinstance(results, tuple):
            return results[0].to(query.dtype), *results[1:]
        return results.to(query.dtype)

    return widened


@in_float32
def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What ``scaled_dot_product_attention`` runs, and the log-sum-exp that it throws away.

    Differentiable in eager mode, by PyTorch's own backward. Its fused kernels take rows without
    gaps, and on the CPU one width for all: others are copied, at most once each. Where it has no
    fused kernel all the same it is the reference, which forms the scores.

    Args:
        query: (B, Nq, D).
        key: (B, Nk, D).
        value: (B, Nk, Dv).
        scale: what the scores are multiplied by.

    Returns:
        (B, Nq, Dv); (B, Nq), the natural logarithm of the sum over the keys of the exponentials of
        the scores. Their memory layout is that of the kernel that ran.
    """
    q, k, v = (t.unsqueeze(1) for t in _fusible(query, key, value))  # (B, 1, N, D)
    aten, choice = torch.ops.aten, SDPBackend(torch._fused_sdp_choice(q, k, v, scale=scale))
    if choice == SDPBackend.FLASH_ATTENTION and q.is_cpu:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    elif choice == SDPBackend.FLASH_ATTENTION and q.shape[-1] % 8 == 0:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    elif choice == SDPBackend.CUDNN_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    elif choice == SDPBackend.EFFICIENT_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, scale=scale
        )
    else:
        return confidence_attention(query, key, value, scale)
    statistic = lse.detach().reshape(len(query), -1)[:, : query.shape[1]]  # may be padded
    return out.squeeze(1)[..., : value.shape[2]], statistic


@in_float32
def sdpa_result(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same without the log-sum-exp, with less overhead."""
    if query.size(0) * query.size(1) * key.size(1) <= measured.FEW_SCORES and query.is_cpu:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)  # without heads
    if query.size(2) != value.size(2):
        return sdpa(query, key, value, scale)[0].contiguous()
    if not query.stride(2) == key.stride(2) == value.stride(2) == 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    q, k = query.unsqueeze(1), key.unsqueeze(1)
    v = k if value is key else value.unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).squeeze(1)


def _fusible(*operands: Tensor) -> Iterator[Tensor]:
    """The operands with rows without gaps; on the CPU padded by zeros to one width."""
    widest = max(t.shape[2] for t in operands)
    for operand in operands:
        if operand.is_cpu and operand.shape[2] < widest:
            yield F.pad(operand, (0, widest - operand.shape[2]))
        else:
            yield operand if operand.stride(2) == 1 else operand.contiguous()


def contiguous(run: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The same results in the layout that the fake kernels promise to traced graphs."""
    return lambda *args: tuple(t.contiguous() for t in run(*args))
