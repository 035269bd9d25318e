"""Triton kernels of position-confidence attention, Eq. 13 in its general form, one head.

    S = scale Q K^T        P = softmax(S) over the keys        O = P V

The backward pass forms P again from the log-sum-exp of the scores:

    P = exp(S - lse) / Z        Z = rowsum(exp(S - lse))
    delta = rowsum(dO * O)      dV = P^T dO      dS = P * (dO V^T - delta)
    dQ = scale dS K             dK = scale dS^T Q

Z would be 1 if lse were exact; where scores are large, the rounding of lse is many roundings of P.
Z is summed up on the way to dQ at no cost, and lse may come from any backend.

This is FlashAttention-2 (Dao 2023, arXiv:2307.08691) with one difference: dK and dV come from two
kernels. At 256 channels the accumulators of both leave room for 64 keys, which the eight warps of a
Hopper GPU would compute twice; in separate kernels each takes 128. That costs 8 products of
matrices instead of 7, and spills no registers.

Every program owns a block of rows of its result, at 512 channels half of their width, and goes
through the other side in order: no atomics, the same bits in every run. Nothing of size Nq x Nk is
written. Sums, P and dS are float32; P and dS are rounded to the inputs' dtype for their products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcibi_fast.ops.confidence_attention.tiles import takes_rows, tiles
from mcibi_fast.ops.triton_attention import (
    LN2,
    Tile,
    as_rows,
    block,
    constants,
    exponential,
    fitting_tile,
    limits,
    load,
    products_by_chunks,
    readable,
    row_products,
    scaled,
    store,
    wide_offsets,
    width,
)


# The kernels' arguments are set out by hand: related ones share a line. The blocks of channels are
# whole rows, but PART is those of the result: the second axis of the grid takes the others.
# fmt: off
@triton.jit
def _channels_of_result(BLOCK: tl.constexpr, PART: tl.constexpr):
    """Those that this program computes."""
    channels = tl.arange(0, PART)
    if PART < BLOCK:
        channels += tl.program_id(1) * PART
    return channels


@triton.jit
def _of_first_part(inside, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Which rows this program writes of what the programs of all parts compute."""
    if PART < BLOCK:
        inside &= tl.program_id(1) == 0
    return inside


@triton.jit
def _forward_kernel(
    query_ptr,  # (B, Nq, D)
    key_ptr,  # (B, Nk, D)
    value_ptr,  # (B, Nk, Dv)
    out_ptr,  # (B, Nq, Dv), contiguous
    lse_ptr,  # (B, Nq) float32, contiguous
    scale, num_queries, num_keys,
    stride_qb, stride_qn, stride_qd,
    stride_kb, stride_kn, stride_kd,
    stride_vb, stride_vn, stride_vd,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):
    """O = softmax(scale Q K^T) V for ROWS queries, the softmax online over blocks of keys.

    lse is the natural logarithm.
    """
    batch, first = block(num_queries, ROWS)
    queries = tl.arange(0, ROWS)
    keys = tl.arange(0, COLUMNS)
    d = tl.arange(0, BLOCK_D)
    dv = _channels_of_result(BLOCK_DV, PART)
    left = num_queries - first
    query_ptr += batch * stride_qb + first.to(tl.int64) * stride_qn
    key_ptr += batch * stride_kb
    value_ptr += batch * stride_vb
    step = tl.full([], COLUMNS, tl.int64)

    if CHUNK == 0:
        q = load(query_ptr, queries, d, stride_qn, stride_qd, left, D, False, WIDE)  # (ROWS, D)
    maximum = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PART], tl.float32)
    for start in range(0, num_keys, COLUMNS):
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

    out /= total[:, None]
    lse = maximum + tl.log2(total) * LN2
    store(out_ptr + (batch * num_queries + first) * DV, out, queries, dv, left, DV)
    inside = _of_first_part(queries < left, BLOCK_DV, PART)
    tl.store(lse_ptr + batch * num_queries + first + queries, lse, mask=inside)


@triton.jit
def _value_gradient_kernel(
    query_ptr,  # (B, Nq, D)
    key_ptr,  # (B, Nk, D)
    grad_ptr,  # (B, Nq, Dv)
    lse_ptr,  # (B, Nq) float32, contiguous
    inverse_ptr,  # (B, Nq) float32, contiguous: 1 / Z
    value_grad_ptr,  # (B, Nk, Dv), contiguous
    scale, num_queries, num_keys,
    stride_qb, stride_qn, stride_qd,
    stride_kb, stride_kn, stride_kd,
    stride_gb, stride_gn, stride_gd,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):
    """dV = P^T dO for ROWS keys. Queries past the end have lse = inf, hence P = 0."""
    batch, first = block(num_keys, ROWS)
    keys = tl.arange(0, ROWS)
    queries = tl.arange(0, COLUMNS)
    d = tl.arange(0, BLOCK_D)
    dv = _channels_of_result(BLOCK_DV, PART)
    left = num_keys - first
    key_ptr += batch * stride_kb + first.to(tl.int64) * stride_kn
    query_ptr += batch * stride_qb
    grad_ptr += batch * stride_gb
    lse_ptr += batch * num_queries
    inverse_ptr += batch * num_queries
    step = tl.full([], COLUMNS, tl.int64)

    if CHUNK == 0:
        k = load(key_ptr, keys, d, stride_kn, stride_kd, left, D, False, WIDE)  # (ROWS, D)
    value_grad = tl.zeros([ROWS, PART], tl.float32)
    for start in range(0, num_queries, COLUMNS):
        queries_left = num_queries - start
        if CHUNK == 0:
            q = load(
                query_ptr, queries, d, stride_qn, stride_qd, queries_left, D, EVEN_COLUMNS, WIDE
            )
            scores = tl.dot(k, tl.trans(q))  # (ROWS, COLUMNS), S^T
        else:
            scores = products_by_chunks(
                key_ptr, query_ptr, keys, queries, stride_kn, stride_kd, stride_qn, stride_qd,
                left, queries_left, D, CHUNK, EVEN_COLUMNS, WIDE,
            )
        inside = queries < queries_left
        lse = tl.load(lse_ptr + queries, mask=inside, other=float("inf"))
        inverse = tl.load(inverse_ptr + queries, mask=inside, other=0.0)
        p = exponential(scaled(scores, scale) - lse[None, :]) * inverse[None, :]
        g = load(grad_ptr, queries, dv, stride_gn, stride_gd, queries_left, DV, EVEN_COLUMNS, WIDE)
        value_grad = tl.dot(p.to(g.dtype), g, value_grad, input_precision="ieee")
        query_ptr += step * stride_qn
        grad_ptr += step * stride_gn
        lse_ptr += COLUMNS
        inverse_ptr += COLUMNS

    store(value_grad_ptr + (batch * num_keys + first) * DV, value_grad, keys, dv, left, DV)


@triton.jit
def _side_gradient_kernel(
    side_ptr,  # (B, Ns, D): the query for dQ, the key for dK
    other_ptr,  # (B, No, D): the key for dQ, the query for dK
    side_outer_ptr,  # (B, Ns, Dv): dO for dQ, the value for dK
    other_outer_ptr,  # (B, No, Dv): the value for dQ, dO for dK
    lse_ptr,  # (B, Nq) float32, contiguous
    inverse_ptr,  # (B, Nq) float32, contiguous: 1 / Z, written with dQ and read for dK
    delta_ptr,  # (B, Nq) float32, contiguous
    side_grad_ptr,  # (B, Ns, D), contiguous
    scale, num_side, num_other,
    stride_sb, stride_sn, stride_sd,
    stride_ob, stride_on, stride_od,
    stride_ub, stride_un, stride_ud,
    stride_wb, stride_wn, stride_wd,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, WIDE: tl.constexpr, SIDE_IS_QUERY: tl.constexpr,
):
    """dQ = scale dS K for ROWS queries, or dK = scale dS^T Q for ROWS keys.

    The two differ in whose rows lse, delta and Z belong to. Past the end dS is 0: queries there
    have lse = inf, and the keys' P is masked, because exp(0 - lse) may be inf.
    """
    batch, first = block(num_side, ROWS)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    part = _channels_of_result(BLOCK_D, PART)
    left = num_side - first
    side_ptr += batch * stride_sb + first.to(tl.int64) * stride_sn
    side_outer_ptr += batch * stride_ub + first.to(tl.int64) * stride_un
    other_ptr += batch * stride_ob
    other_outer_ptr += batch * stride_wb
    step = tl.full([], COLUMNS, tl.int64)

    if SIDE_IS_QUERY:
        lse_ptr += batch * num_side + first
        inverse_ptr += batch * num_side + first
        delta_ptr += batch * num_side + first
        lse = tl.load(lse_ptr + rows, mask=rows < left, other=float("inf"))[:, None]
        delta = tl.load(delta_ptr + rows, mask=rows < left, other=0.0)[:, None]
        total = tl.zeros([ROWS], tl.float32)  # Z
    else:
        lse_ptr += batch * num_other
        inverse_ptr += batch * num_other
        delta_ptr += batch * num_other
    if CHUNK == 0:
        a = load(side_ptr, rows, d, stride_sn, stride_sd, left, D, False, WIDE)
        u = load(side_outer_ptr, rows, dv, stride_un, stride_ud, left, DV, False, WIDE)
    side_grad = tl.zeros([ROWS, PART], tl.float32)
    for start in range(0, num_other, COLUMNS):
        others_left = num_other - start
        b = load(other_ptr, columns, d, stride_on, stride_od, others_left, D, EVEN_COLUMNS, WIDE)
        if CHUNK == 0:
            w = load(
                other_outer_ptr, columns, dv, stride_wn, stride_wd, others_left, DV,
                EVEN_COLUMNS, WIDE,
            )
            scores = tl.dot(a, tl.trans(b))  # (ROWS, COLUMNS): S or S^T
            dp = tl.dot(u, tl.trans(w))  # (ROWS, COLUMNS): dP or dP^T
        else:
            scores = products_by_chunks(
                side_ptr, other_ptr, rows, columns, stride_sn, stride_sd, stride_on, stride_od,
                left, others_left, D, CHUNK, EVEN_COLUMNS, WIDE,
            )
            dp = products_by_chunks(
                side_outer_ptr, other_outer_ptr, rows, columns,
                stride_un, stride_ud, stride_wn, stride_wd,
                left, others_left, DV, CHUNK, EVEN_COLUMNS, WIDE,
            )
        if not SIDE_IS_QUERY:
            inside = columns < others_left
            lse = tl.load(lse_ptr + columns, mask=inside, other=float("inf"))[None, :]
            inverse = tl.load(inverse_ptr + columns, mask=inside, other=0.0)[None, :]
            delta = tl.load(delta_ptr + columns, mask=inside, other=0.0)[None, :]
            lse_ptr += COLUMNS
            inverse_ptr += COLUMNS
            delta_ptr += COLUMNS
        p = exponential(scaled(scores, scale) - lse)
        if SIDE_IS_QUERY:
            if not EVEN_COLUMNS:
                p = tl.where(columns[None, :] < others_left, p, 0.0)
            total += tl.sum(p, 1)
        else:
            p *= inverse
        ds = p * (dp - delta)
        if PART < BLOCK_D:
            b = load(
                other_ptr, columns, part, stride_on, stride_od, others_left, D, EVEN_COLUMNS, WIDE
            )
        side_grad = tl.dot(ds.to(b.dtype), b, side_grad, input_precision="ieee")
        other_ptr += step * stride_on
        other_outer_ptr += step * stride_wn

    if SIDE_IS_QUERY:
        inverse = 1.0 / total
        tl.store(inverse_ptr + rows, inverse, mask=_of_first_part(rows < left, BLOCK_D, PART))
        side_grad *= (scale * inverse)[:, None]
    else:
        side_grad *= scale
    store(side_grad_ptr + (batch * num_side + first) * D, side_grad, rows, part, left, D)
# fmt: on


def _constants(
    tile: Tile, dim: int, value_dim: int, result_dim: int, columns: int, wide: bool
) -> dict[str, Any]:
    heads = {"D": dim, "DV": value_dim, "BLOCK_D": width(dim), "BLOCK_DV": width(value_dim)}
    part = min(width(result_dim), tile.part or width(result_dim))
    return {**heads, "PART": part, **constants(tile, columns, wide)}


def confidence_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale Q K^T) V (Eq. 13) and the log-sum-exp of each query's scores.

    Allocates the two results, and a copy of each input whose memory is not readable 16 elements
    at a time (channels a multiple of 16, but neither rows nor columns contiguous and aligned).

    Args:
        query: (B, Nq, D), any strides; float32, bfloat16 or float16; D at most 512.
        key: (B, Nk, D), likewise.
        value: (B, Nk, Dv), likewise.
        scale: what the scores are multiplied by.

    Returns:
        (B, Nq, Dv), contiguous, in the inputs' dtype; (B, Nq) float32, natural logarithm.
    """
    batch, num_queries, dim = query.shape
    num_keys, value_dim = value.shape[1:]
    out = query.new_empty(batch, num_queries, value_dim)
    lse = query.new_empty(batch, num_queries, dtype=torch.float32)
    query, key, value = map(readable, (query, key, value))
    shared_memory, processors = limits(query.device)
    choices = tiles(query.dtype, max(dim, value_dim), shared_memory).scores
    tile = fitting_tile(choices, batch, num_queries, processors, value_dim)
    # fmt: off
    with torch.cuda.device_of(query):
        _forward_kernel[tile.grid(batch, num_queries, value_dim)](
            query, key, value, out, lse, scale, num_queries, num_keys,
            *query.stride(), *key.stride(), *value.stride(),
            **_constants(
                tile, dim, value_dim, value_dim, num_keys, wide_offsets(query, key, value)
            ),
        )
    # fmt: on
    return out, lse


def confidence_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    Allocates the three results, two statistics (B, Nq) in float32, and copies of inputs as in the
    forward pass; on a Hopper GPU or a newer one also copies of maps in 16 bits, see ``as_rows``.

    Args:
        grad: dO, (B, Nq, Dv), any strides.
        query, key, value, scale: what the forward pass took.
        out, lse: what it returned, or another backend's on the same inputs.

    Returns:
        dQ, dK and dV, contiguous, in the shapes and the dtype of query, key and value.
    """
    batch, num_queries, dim = query.shape
    num_keys, value_dim = value.shape[1:]
    query_grad, key_grad, value_grad = (t.new_empty(t.shape) for t in (query, key, value))
    inverse = torch.empty_like(lse)  # 1 / Z
    shared_memory, processors = limits(query.device)
    choices = tiles(query.dtype, max(dim, value_dim), shared_memory)
    key_tile = fitting_tile(choices.scores, batch, num_keys, processors, value_dim)
    rows = as_rows if takes_rows(key_tile, shared_memory) else readable
    grad, query, key, value = map(rows, (grad, query, key, value))
    wide = wide_offsets(grad, query, key, value)
    key_both_tile = fitting_tile(choices.both, batch, num_keys, processors, dim)
    query_tile = fitting_tile(choices.both, batch, num_queries, processors, dim)
    # fmt: off
    with torch.cuda.device_of(query):
        delta = row_products(grad, out, query_tile.chunk)
        # The one of dQ first: it writes inverse, which the others read.
        _side_gradient_kernel[query_tile.grid(batch, num_queries, dim)](
            query, key, grad, value, lse, inverse, delta, query_grad, scale,
            num_queries, num_keys,
            *query.stride(), *key.stride(), *grad.stride(), *value.stride(),
            **_constants(query_tile, dim, value_dim, dim, num_keys, wide), SIDE_IS_QUERY=True,
        )
        _value_gradient_kernel[key_tile.grid(batch, num_keys, value_dim)](
            query, key, grad, lse, inverse, value_grad, scale, num_queries, num_keys,
            *query.stride(), *key.stride(), *grad.stride(),
            **_constants(key_tile, dim, value_dim, value_dim, num_queries, wide),
        )
        _side_gradient_kernel[key_both_tile.grid(batch, num_keys, dim)](
            key, query, value, grad, lse, inverse, delta, key_grad, scale, num_keys, num_queries,
            *key.stride(), *query.stride(), *value.stride(), *grad.stride(),
            **_constants(key_both_tile, dim, value_dim, dim, num_queries, wide),
            SIDE_IS_QUERY=False,
        )
    # fmt: on
    return query_grad, key_grad, value_grad
