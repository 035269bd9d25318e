"""The forward kernel of attention on class weights, whose formulas are in ``triton.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from mcibi_fast.ops.triton_attention import (
    block,
    exponential,
    load_parts,
    log_sum_exp,
    lowest,
    products_by_chunks,
    products_of_parts,
    scaled,
    store_parts,
)
from mcibi_fast.ops.triton_split import keys_of_program, store_statistics


# K is the number of classes, PADDED that in the inputs' memory, BLOCK + REST that of a tile, in two
# parts. With SPLIT the third axis of the grid takes other keys.
# fmt: off
@triton.jit
def class_rank_forward_kernel(
    query_ptr,  # (B, N, PADDED)
    weights_ptr,  # (B, N, PADDED)
    out_ptr,  # (B, N, K), contiguous; SPLIT: A_s, (B, splits, N, K) float32
    lse_ptr,  # (B, N) float32, contiguous; SPLIT: m_s and l_s, (B, splits, 2, N)
    scale, num_pixels, span,
    stride_qb, stride_qn, stride_qk,
    stride_wb, stride_wn, stride_wk,
    K: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
):
    """O = softmax(scale Q W^T) W for ROWS queries, the softmax online over blocks of keys.

    lse is the natural logarithm. With SPLIT only span keys, and what ``triton_split.join`` takes.
    """
    batch, first = block(num_pixels, ROWS)
    queries = tl.arange(0, ROWS)
    keys = tl.arange(0, COLUMNS)
    left = num_pixels - first
    query_ptr += batch * stride_qb + first.to(tl.int64) * stride_qn
    weights_ptr += batch * stride_wb
    step = tl.full([], COLUMNS, tl.int64)
    begin, end = keys_of_program(num_pixels, span, SPLIT)
    if SPLIT:
        weights_ptr += begin.to(tl.int64) * stride_wn

    if CHUNK == 0:
        q, q_rest = load_parts(
            query_ptr, queries, stride_qn, stride_qk, left, PADDED, BLOCK, REST, False, WIDE
        )
    maximum = lowest(ROWS)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK], tl.float32)
    if REST > 0:
        out_rest = tl.zeros([ROWS, REST], tl.float32)
    for start in range(begin, end, COLUMNS):
        keys_left = num_pixels - start
        w, w_rest = load_parts(
            weights_ptr, keys, stride_wn, stride_wk, keys_left, PADDED, BLOCK, REST,
            EVEN_COLUMNS, WIDE,
        )
        if CHUNK == 0:
            scores = products_of_parts(q, q_rest, w, w_rest, REST)  # (ROWS, COLUMNS)
        else:
            scores = products_by_chunks(
                query_ptr, weights_ptr, queries, keys, stride_qn, stride_qk, stride_wn, stride_wk,
                left, keys_left, PADDED, CHUNK, EVEN_COLUMNS, WIDE,
            )
        scores = scaled(scores, scale)
        if not EVEN_COLUMNS:
            scores = tl.where(keys[None, :] < keys_left, scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        p = exponential(scores - new_maximum[:, None])
        correction = exponential(maximum - new_maximum)
        total = total * correction + tl.sum(p, 1)
        out *= correction[:, None]
        out = tl.dot(p.to(w.dtype), w, out, input_precision="ieee")
        if REST > 0:
            out_rest *= correction[:, None]
            out_rest = tl.dot(p.to(w.dtype), w_rest, out_rest, input_precision="ieee")
        maximum = new_maximum
        weights_ptr += step * stride_wn

    rest = out
    if SPLIT:
        if REST > 0:
            rest = out_rest
        part = batch * tl.num_programs(2) + tl.program_id(2)
        out_ptr += (part * num_pixels + first) * K
        store_parts(out_ptr, out, rest, queries, left, K, BLOCK, REST)
        store_statistics(
            lse_ptr, maximum, total, queries, queries < left, part, first, num_pixels
        )
    else:
        out /= total[:, None]
        rest = out
        if REST > 0:
            rest = out_rest / total[:, None]
        lse = log_sum_exp(maximum, total)
        out_ptr += (batch * num_pixels + first) * K
        store_parts(out_ptr, out, rest, queries, left, K, BLOCK, REST)
        tl.store(lse_ptr + batch * num_pixels + first + queries, lse, mask=queries < left)
# fmt: on
