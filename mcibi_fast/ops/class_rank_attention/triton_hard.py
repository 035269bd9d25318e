"""Triton kernels of class-rank attention where each row of W is a one-hot vector.

N keys are then K different ones, each counted as often as it occurs, and P W is P:

    O = softmax(scale Q + log n) over the classes,    n[k] = the number of rows of class k

O(N K). A class of no row has weight 0. The counts are sums of integers, the same in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcibi_fast.ops.triton_attention import (
    block,
    cdiv,
    exponential,
    load,
    store,
    wide_offsets,
    width,
)

TILE = 2048  # elements, of at most 128 rows


# fmt: off
@triton.jit
def _count_kernel(
    weights_ptr,  # (B, N, K)
    counts_ptr,  # (B, K) int32, contiguous, zero at first
    num_pixels,
    stride_wb, stride_wn, stride_wk,
    K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):
    """Adds to n the first argmaxes of ROWS rows; NaN counts as the largest, as in PyTorch."""
    batch, first = block(num_pixels, ROWS)
    rows = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    left = num_pixels - first
    weights_ptr += batch * stride_wb + first.to(tl.int64) * stride_wn
    w = load(weights_ptr, rows, k, stride_wn, stride_wk, left, K, False, WIDE).to(tl.float32)
    # Integers in the order of the numbers, where -0 is 0 and NaN is the largest.
    bits = w.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    order = tl.where(w == w, order, 0x7FFFFFFF)
    order = tl.where(k[None, :] < K, order, -0x80000000)
    best = tl.argmax(order, 1)  # the first on ties
    found = (best[:, None] == k[None, :]) & (rows[:, None] < left)
    counts = tl.sum(found.to(tl.int32), 0)
    tl.atomic_add(counts_ptr + batch * K + k, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _softmax_kernel(
    query_ptr,  # (B, N, K)
    counts_ptr,  # (B, K) int32, contiguous
    out_ptr,  # (B, N, K), contiguous
    lse_ptr,  # (B, N) float32, contiguous
    scale, num_pixels,
    stride_qb, stride_qn, stride_qk,
    K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):
    """O for ROWS queries: n exp(S - max) and its sum, which saves rounding log n."""
    batch, first = block(num_pixels, ROWS)
    rows = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    left = num_pixels - first
    query_ptr += batch * stride_qb + first.to(tl.int64) * stride_qn
    q = load(query_ptr, rows, k, stride_qn, stride_qk, left, K, False, WIDE).to(tl.float32)
    counts = tl.load(counts_ptr + batch * K + k, mask=k < K, other=0).to(tl.float32)[None, :]
    scores = tl.where(counts > 0, scale * q, -float("inf"))
    maximum = tl.max(scores, 1)
    terms = counts * exponential(scores - maximum[:, None])
    total = tl.sum(terms, 1)
    row = batch * num_pixels + first
    store(out_ptr + row * K, terms / total[:, None], rows, k, left, K)
    tl.store(lse_ptr + row + rows, maximum + tl.log(total), mask=rows < left)
# fmt: on


def class_rank_attention_hard(
    query: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale Q W^T) W (Eq. 13), each row of W the one-hot of its first argmax.

    Allocates the two results and (B, K) counts.

    Args:
        query: Q, (B, N, K), any strides; float32, bfloat16 or float16; K at most 256.
        weights: W, (B, N, K), likewise.
        scale: what the scores are multiplied by.

    Returns:
        (B, N, K), contiguous, in the inputs' dtype; (B, N) float32, the log-sum-exp over the N
        keys of each query's scores.
    """
    batch, num_pixels, classes = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty(batch, num_pixels, dtype=torch.float32)
    counts = query.new_zeros(batch, classes, dtype=torch.int32)
    rows = TILE // width(classes)
    options = {
        "K": classes,
        "BLOCK": width(classes),
        "ROWS": rows,
        "enable_fp_fusion": True,
    }
    grid = (batch * cdiv(num_pixels, rows),)
    # fmt: off
    with torch.cuda.device_of(query):
        _count_kernel[grid](
            weights, counts, num_pixels, *weights.stride(), **options, WIDE=wide_offsets(weights),
        )
        _softmax_kernel[grid](
            query, counts, out, lse, scale, num_pixels, *query.stride(),
            **options, WIDE=wide_offsets(query),
        )
    # fmt: on
    return out, lse
