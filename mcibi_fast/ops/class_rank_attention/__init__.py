"""Position-confidence attention, Eq. 13, where keys and values are the class weights themselves.

With linear projections the context of a pixel is a mixture of K class representations, so that the
attention can run on the weights W: softmax(scale Q W^T) W, with heads of width K instead of the
projections' width and one operand for keys and values. One-hot weights make it a softmax over the K
classes, with the logarithm of each class's pixel count added: O(N K) instead of O(N^2 K).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcibi_fast.ops import checks, measured
from mcibi_fast.ops.class_rank_attention import reference
from mcibi_fast.ops.compiled import cpu_kernel
from mcibi_fast.ops.confidence_attention import plain
from mcibi_fast.ops.confidence_attention.sdpa import contiguous, sdpa, sdpa_result
from mcibi_fast.ops.dispatch import (
    Kernel,
    Op,
    always,
    no_gradient_of,
    recompute_gradients,
)
from mcibi_fast.ops.triton_support import triton_missing

MAX_CLASSES = 256  # of the Triton kernels, which hold a row of W on the chip


def class_rank_attention(
    query: Tensor, weights: Tensor, *, scale: float, hard: bool = False
) -> Tensor:
    """P W with P = softmax(scale Q W^T) over the N keys (Eq. 13 on class weights).

    Differentiable once in both; with ``hard`` in the query alone. Allocates the result, one number
    per pixel and, while it runs, at most copies of its inputs, and on a GPU that so few pixels
    would not fill, sums over parts of the keys, at most 129 KiB for each multiprocessor (17 MB on
    an H200); the scores only in bfloat16 from 64 classes on, on CPUs where that is faster, and
    there at most 2^24 (32 MiB, as much for their softmax). Under autocast the inputs are cast to
    its dtype. The same inputs give the same bits in every run and with any number of threads,
    except where the scores are formed, and for gradients where PyTorch's
    ``scaled_dot_product_attention`` runs (``mcibi_fast.explain`` says where).

    Args:
        query: Q, (B, N, K), float32, float64, bfloat16 or float16, any strides: the projected
            query times the projected class representations.
        weights: W, (B, N, K), one row of class weights per pixel.
        scale: what the scores are multiplied by: T ** -0.5 for projections of width T.
        hard: each row of W counts as the one-hot vector of its largest entry, the first on ties
            (so the logits of W do as well as W).

    Returns:
        (B, N, K) in the dtype of the inputs.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device.
    """
    return ATTENTION.first(*_prepare(query, weights, scale, hard))


def _prepare(query: Tensor, weights: Tensor, scale: float, hard: bool) -> tuple[Any, ...]:
    checks.tensor("query", query, "B, N, K", checks.FLOATS)
    checks.tensor("weights", weights, "B, N, K", checks.FLOATS)
    checks.not_empty("query", query)  # weights have the same shape, or are refused for that
    if query.device != weights.device:
        checks.same_device(query=query, weights=weights)
    query, weights = checks.under_autocast(query, weights)
    if query.dtype != weights.dtype:
        raise TypeError(f"query, weights: one dtype for both, got {query.dtype}, {weights.dtype}")
    if query.shape != weights.shape:
        raise ValueError(
            f"weights: expected the query's shape {tuple(query.shape)}, got {tuple(weights.shape)}"
        )
    return query, weights, checks.finite("scale", scale), hard


# --- scaled_dot_product_attention ---------------------------------------------------------------


def _sdpa_shared(query: Tensor, weights: Tensor, scale: float, hard: bool) -> tuple[Tensor, Tensor]:
    """On a GPU with the classes padded by zeros, which change nothing, to what its kernels take."""
    K = query.shape[2]
    if query.is_cuda and K % 8:
        query, weights = (F.pad(t, (0, -K % 8)) for t in (query, weights))
    out, lse = sdpa(query, weights, weights, scale)
    return out[..., :K].contiguous(), lse.contiguous()


def _sdpa_result(query: Tensor, weights: Tensor, scale: float, hard: bool) -> Tensor:
    if query.is_cuda:
        return _sdpa_shared(query, weights, scale, hard)[0]
    return sdpa_result(query, weights, weights, scale)


def _sdpa_why_not(query: Tensor, weights: Tensor, scale: float, hard: bool) -> str | None:
    return "hard attention is a softmax over classes, not over keys" if hard else None


# --- the CPU's kernel ---------------------------------------------------------------------------


def _slower(query: Tensor, weights: Tensor, scale: float, hard: bool) -> str | None:
    return measured.fused(query, weights, hard) or measured.wide_rows(query, hard)


def _cpu_kernel(name: str) -> Kernel:
    return replace(cpu_kernel(name), slower=_slower)


# --- plain operators ----------------------------------------------------------------------------


def _plain(query: Tensor, weights: Tensor, scale: float, hard: bool) -> tuple[Tensor, Tensor]:
    return plain.attention_and_lse(query, weights, weights, scale)


def _plain_result(query: Tensor, weights: Tensor, scale: float, hard: bool) -> Tensor:
    return plain.attention(query, weights, weights, scale).contiguous()


def _plain_why_not(query: Tensor, weights: Tensor, scale: float, hard: bool) -> str | None:
    if hard:
        return "hard attention is a softmax over classes, not over keys"
    if not query.is_cpu:
        return f"a tensor is on {query.device.type}, not on cpu"
    scores, most = query.shape[0] * query.shape[1] ** 2, measured.WIDE_MOST
    return f"{scores} scores; it forms at most {most}" if scores > most else None


def _plain_slower(query: Tensor, weights: Tensor, scale: float, hard: bool) -> str | None:
    if measured.wide_rows(query, hard):
        return None
    return "it is faster only for many classes in bfloat16 on CPUs that multiply it"


# --- Triton -------------------------------------------------------------------------------------


def _triton(query: Tensor, weights: Tensor, scale: float, hard: bool) -> tuple[Tensor, Tensor]:
    if hard:
        from mcibi_fast.ops.class_rank_attention.triton_hard import class_rank_attention_hard

        return class_rank_attention_hard(query, weights, scale)
    from mcibi_fast.ops.class_rank_attention.triton import class_rank_attention_forward

    return class_rank_attention_forward(query, weights, scale)


def _triton_backward(*args: Any) -> tuple[Tensor, ...]:
    from mcibi_fast.ops.class_rank_attention.triton import class_rank_attention_backward

    return class_rank_attention_backward(*args)


def _triton_why_not(query: Tensor, *_: Any) -> str | None:
    return triton_missing(query, query.shape[2], MAX_CLASSES)


# --- the operators ------------------------------------------------------------------------------


def _fake(query: Tensor, weights: Tensor, scale: float, hard: bool) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:2], dtype=checks.wide(query.dtype))
    return query.new_empty(query.shape), lse


ATTENTION = Op(
    "class_rank_attention",
    [
        # Hard attention has no other kernel on a GPU. Of the soft form, Triton's reads W once for
        # keys and values, but which of it and SDPA is the faster is still to be measured.
        Kernel("triton", _triton, _triton_why_not),
        _cpu_kernel,
        Kernel(
            "pytorch",
            contiguous(_plain),
            _plain_why_not,
            composite=True,
            slower=_plain_slower,
            first=_plain_result,
        ),
        Kernel("sdpa", _sdpa_shared, _sdpa_why_not, composite=True, first=_sdpa_result),
        Kernel("reference", reference.class_rank_attention, always, composite=True),
    ],
    _fake,
    public=class_rank_attention,
    prepare=_prepare,
)


def _recomputed(run: Any) -> Any:
    """The backward of a composite kernel of the soft form."""

    def backward(
        grad: Tensor, query: Tensor, weights: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        return recompute_gradients(lambda q, w: run(q, w, scale, False)[0], [query, weights], grad)

    return contiguous(backward)


ATTENTION_BACKWARD = Op(
    "class_rank_attention_backward",
    [
        Kernel("triton", _triton_backward, _triton_why_not),
        cpu_kernel,
        Kernel("sdpa", _recomputed(_sdpa_shared), always),
        Kernel("reference", _recomputed(reference.class_rank_attention), always),
    ],
    lambda grad, query, weights, out, lse, scale: tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, weights)
    ),
)
ATTENTION_BACKWARD.refuse_gradient()


def _hard_gradient(grad: Tensor, out: Tensor, scale: float) -> Tensor:
    """scale P (dP - rowsum(P dP)); one thread sums each row, which PyTorch does not guarantee."""
    P, dP = (t.to(checks.wide(t.dtype)) for t in (out, grad))
    products = P * dP  # first P, which is contiguous
    return (scale * (products - P * products.sum(-1, keepdim=True))).to(out.dtype)


class ClassRankAttention(torch.autograd.Function):
    """Saves the inputs, the result and its log-sum-exp; the scores are formed again.

    The hard form's result is its softmax over classes, which is all that its gradient needs.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, weights: Tensor, scale: float, hard: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse = ATTENTION.below_autograd(query, weights, scale, hard)
        ctx.save_for_backward(*((out,) if hard else (query, weights, out, lse)))
        ctx.scale, ctx.hard = scale, hard
        no_gradient_of(ctx, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _lse: None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 4
        if ctx.hard:
            (out,) = ctx.saved_tensors
            return _hard_gradient(grad, out, ctx.scale), None, None, None
        return *ATTENTION_BACKWARD(grad, *ctx.saved_tensors, ctx.scale), None, None


ATTENTION.differentiable(
    ClassRankAttention.apply,
    lambda query, weights, scale, hard: query.requires_grad or (weights.requires_grad and not hard),
    reference.class_rank_attention,
)
