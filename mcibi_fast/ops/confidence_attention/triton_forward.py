"""The forward kernel of position-confidence attention, whose formulas are in ``triton.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from mcibi_fast.ops.triton_attention import (
    block,
    channels_of_result,
    exponential,
    load,
    log_sum_exp,
    lowest,
    of_first_part,
    products_by_chunks,
    scaled,
    store,
)
from mcibi_fast.ops.triton_split import keys_of_program, store_statistics


# The blocks of channels are whole rows, but PART is those of the result: the second axis of the
# grid takes the others. With SPLIT the third axis takes other keys.
# fmt: off
@triton.jit
def attention_forward_kernel(
    query_ptr,  # (B, Nq, D)
    key_ptr,  # (B, Nk, D)
    value_ptr,  # (B, Nk, Dv)
    out_ptr,  # (B, Nq, Dv), contiguous; SPLIT: A_s, (B, splits, Nq, Dv) float32
    lse_ptr,  # (B, Nq) float32, contiguous; SPLIT: m_s and l_s, (B, splits, 2, Nq)
    scale, num_queries, num_keys, span,
    stride_qb, stride_qn, stride_qd,
    stride_kb, stride_kn, stride_kd,
    stride_vb, stride_vn, stride_vd,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
):
    """O = softmax(scale Q K^T) V for ROWS queries, the softmax online over blocks of keys.

    lse is the natural logarithm. With SPLIT only span keys, and what ``triton_split.join`` takes.
    """
    batch, first = block(num_queries, ROWS)
    queries = tl.arange(0, ROWS)
    keys = tl.arange(0, COLUMNS)
    d = tl.arange(0, BLOCK_D)
    dv = channels_of_result(BLOCK_DV, PART)
    left = num_queries - first
    query_ptr += batch * stride_qb + first.to(tl.int64) * stride_qn
    key_ptr += batch * stride_kb
    value_ptr += batch * stride_vb
    step = tl.full([], COLUMNS, tl.int64)
    begin, end = keys_of_program(num_keys, span, SPLIT)
    if SPLIT:
        key_ptr += begin.to(tl.int64) * stride_kn
        value_ptr += begin.to(tl.int64) * stride_vn

    if CHUNK == 0:
        q = load(query_ptr, queries, d, stride_qn, stride_qd, left, D, False, WIDE)  # (ROWS, D)
    maximum = lowest(ROWS)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PART], tl.float32)
    for start in range(begin, end, COLUMNS):
        keys_left = num_keys - start
        if CHUNK == 0:
            k = load(key_ptr, keys, d, stride_kn, stride_kd, keys_left, D, EVEN_COLUMNS, WIDE)
            scores = tl.dot(q, tl.trans(k))  # (ROWS, COLUMNS)
        else:
            scores = products_by_chunks(
                query_ptr, key_ptr, queries, keys, stride_qn, stride_qd, stride_kn, stride_kd,
                left, keys_left, D, CHUNK, EVEN_COLUMNS, WIDE,
            )
        scores = scaled(scores, scale)
        if not EVEN_COLUMNS:
            scores = tl.where(keys[None, :] < keys_left, scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        p = exponential(scores - new_maximum[:, None])
        correction = exponential(maximum - new_maximum)
        total = total * correction + tl.sum(p, 1)
        out *= correction[:, None]
        v = load(value_ptr, keys, dv, stride_vn, stride_vd, keys_left, DV, EVEN_COLUMNS, WIDE)
        out = tl.dot(p.to(v.dtype), v, out, input_precision="ieee")
        maximum = new_maximum
        key_ptr += step * stride_kn
        value_ptr += step * stride_vn

    inside = of_first_part(queries < left, BLOCK_DV, PART)
    if SPLIT:
        part = batch * tl.num_programs(2) + tl.program_id(2)
        store(out_ptr + (part * num_queries + first) * DV, out, queries, dv, left, DV)
        store_statistics(lse_ptr, maximum, total, queries, inside, part, first, num_queries)
    else:
        out /= total[:, None]
        lse = log_sum_exp(maximum, total)
        store(out_ptr + (batch * num_queries + first) * DV, out, queries, dv, left, DV)
        tl.store(lse_ptr + batch * num_queries + first + queries, lse, mask=inside)
# fmt: on
