"""Position-confidence attention, Eq. 13, general form: softmax(scale Q K^T) V with one wide head.

The scores are never written to memory. On a GPU a Triton kernel runs it (heads of 256 and 512,
for which PyTorch's flash attention has no kernel above 256); elsewhere, and where it is faster,
``scaled_dot_product_attention``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mcibi_fast.ops import checks
from mcibi_fast.ops.confidence_attention import plain, reference
from mcibi_fast.ops.confidence_attention.sdpa import contiguous, sdpa, sdpa_result
from mcibi_fast.ops.dispatch import (
    Kernel,
    Op,
    always,
    forced,
    no_gradient_of,
    recompute_gradients,
)
from mcibi_fast.ops.triton_support import triton_missing

MAX_CHANNELS = 512  # of the Triton kernels, which hold a row of Q, K or V on the chip
# From here on float32 on a GPU is left to PyTorch's attention: without matrix instructions, which
# TF32 would make inexact, ours is predicted to be slower than separate products.
SDPA_FLOAT32_CHANNELS = 128


def confidence_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None
) -> Tensor:
    """P V with P = softmax(scale Q K^T) over the keys (Eq. 13).

    Differentiable once. Allocates the result and one number per query; on a GPU that so few queries
    would not fill, also sums over parts of the keys, at most 129 KiB for each multiprocessor (17 MB
    on an H200); and the scores only on the CPU where that is faster and there are at most 2^22
    (``mcibi_fast.explain`` says where). On a CPU without products of 16-bit floats such inputs are
    copied to float32 where gradients are wanted. Under autocast the inputs are cast to its dtype.
    On the CPU the bits of the gradients, and where the scores are formed those of the result, may
    depend on the number of threads, as PyTorch's do.

    Args:
        query: (B, Nq, D), float32, float64, bfloat16 or float16, any strides (the transposed view
            of a (B, D, h, w) map is as good as a contiguous tensor).
        key: (B, Nk, D).
        value: (B, Nk, Dv).
        scale: D ** -0.5 by default.

    Returns:
        (B, Nq, Dv) in the dtype of the inputs.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device.
    """
    return ATTENTION.first(*_prepare(query, key, value, scale))


def _prepare(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Any, ...]:
    if not _fit(query, key, value):
        _refuse(query, key, value)
    query, key, value = checks.under_autocast(query, key, value)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key, value: one dtype for all three, got {query.dtype}, {key.dtype}, "
            f"{value.dtype}"
        )
    if scale is None:
        scale = query.size(2) ** -0.5
    return query, key, value, checks.finite("scale", scale)


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the operands pass the checks of ``_refuse``, found in a fifth of their time."""
    if not type(query) is type(key) is type(value) is Tensor:
        return False
    if not (query.dtype == key.dtype == value.dtype and query.dtype in checks.FLOATS):
        return False
    of_query, of_key = query.shape, key.shape
    if not len(of_query) == len(of_key) == 3 or of_key != value.shape:
        return False
    if of_query[0] != of_key[0] or of_query[2] != of_key[2] or 0 in of_query or 0 in of_key:
        return False
    return query.device == key.device == value.device


def _refuse(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises unless the operands go together, whatever autocast makes of their dtypes."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        checks.tensor(name, t, "B, N, D", checks.FLOATS)
        checks.not_empty(name, t)
    checks.same_device(query=query, key=key, value=value)
    if query.size(0) != key.size(0) or query.size(2) != key.size(2):
        raise ValueError(
            f"key: expected ({query.shape[0]}, Nk, {query.shape[2]}) to go with the query, "
            f"got {tuple(key.shape)}"
        )
    if key.size(0) != value.size(0) or key.size(1) != value.size(1):
        raise ValueError(
            f"value: expected ({key.shape[0]}, {key.shape[1]}, Dv) to go with the key, "
            f"got {tuple(value.shape)}"
        )


# --- scaled_dot_product_attention ---------------------------------------------------------------


def _sdpa_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, scale)[0]

    return recompute_gradients(attend, [query, key, value], grad)


# --- Triton -------------------------------------------------------------------------------------


def _triton(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from mcibi_fast.ops.confidence_attention.triton import confidence_attention_forward

    return confidence_attention_forward(query, key, value, scale)


def _triton_backward(*args: Any) -> tuple[Tensor, ...]:
    from mcibi_fast.ops.confidence_attention.triton import confidence_attention_backward

    return confidence_attention_backward(*args)


def _triton_why_not(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> str | None:
    dim, value_dim = query.shape[2], value.shape[2]
    widest = max(dim, value_dim)
    missing = triton_missing(query, widest, MAX_CHANNELS)
    if missing is not None or query.dtype != torch.float32 or widest < SDPA_FLOAT32_CHANNELS:
        return missing
    fused = query.is_cuda and dim % 4 == value_dim % 4 == 0  # PyTorch has a kernel
    if fused and forced() != "triton":
        return f"float32 rows of {widest} channels, for which sdpa should be faster"
    return None


def _triton_backward_why_not(grad: Tensor, *args: Any) -> str | None:
    return _triton_why_not(*args)


# --- the operators ------------------------------------------------------------------------------


def _fake(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, queries = query.shape[0], query.shape[1]
    out = query.new_empty((batch, queries, value.shape[2]))
    return out, query.new_empty((batch, queries), dtype=checks.wide(query.dtype))


ATTENTION = Op(
    "confidence_attention",
    [
        Kernel(
            "pytorch",
            contiguous(plain.attention_and_lse),
            plain.why_not,
            composite=True,
            first=plain.attention,
        ),
        Kernel("triton", _triton, _triton_why_not),
        Kernel("sdpa", contiguous(sdpa), always, composite=True, first=sdpa_result),
        Kernel("reference", reference.confidence_attention, always, composite=True),
    ],
    _fake,
    public=confidence_attention,
    prepare=_prepare,
)

ATTENTION_BACKWARD = Op(
    "confidence_attention_backward",
    [
        Kernel("triton", _triton_backward, _triton_backward_why_not),
        Kernel("sdpa", contiguous(_sdpa_backward), always),
    ],
    lambda grad, query, key, value, out, lse, scale: tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)
    ),
)
ATTENTION_BACKWARD.refuse_gradient()


class ConfidenceAttention(torch.autograd.Function):
    """Saves the inputs, the result and its log-sum-exp; the scores are formed again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = ATTENTION.below_autograd(query, key, value, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale = scale
        no_gradient_of(ctx, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _lse: None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 4
        return *ATTENTION_BACKWARD(grad, *ctx.saved_tensors, ctx.scale), None


ATTENTION.differentiable(
    ConfidenceAttention.apply,
    lambda query, key, value, scale: any(t.requires_grad for t in (query, key, value)),
    reference.confidence_attention,
)
