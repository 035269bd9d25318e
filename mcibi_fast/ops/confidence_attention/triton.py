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
through the other side in order: no atomics, the same bits in every run. Forward it may be a part of
the other side, see ``triton_split``. Nothing of size Nq x Nk is written.

Sums, P and dS are float32; P and dS are rounded to the inputs' dtype for their products.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcibi_fast.ops.confidence_attention.tiles import takes_rows, tiles
from mcibi_fast.ops.confidence_attention.triton_forward import attention_forward_kernel
from mcibi_fast.ops.triton_attention import (
    Tile,
    as_rows,
    block,
    channels_of_result,
    constants,
    exponential,
    limits,
    load,
    of_first_part,
    products_by_chunks,
    readable,
    row_products,
    scaled,
    store,
    wide_offsets,
    width,
)
from mcibi_fast.ops.triton_split import cut, join, parts


# The kernels' arguments are set out by hand: related ones share a line. The blocks of channels are
# whole rows, but PART is those of the result: the second axis of the grid takes the others.
# fmt: off
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
    dv = channels_of_result(BLOCK_DV, PART)
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
    part = channels_of_result(BLOCK_D, PART)
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
        tl.store(inverse_ptr + rows, inverse, mask=of_first_part(rows < left, BLOCK_D, PART))
        side_grad *= (scale * inverse)[:, None]
    else:
        side_grad *= scale
    store(side_grad_ptr + (batch * num_side + first) * D, side_grad, rows, part, left, D)
# fmt: on


@functools.cache
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
    Where the queries alone leave multiprocessors idle, the keys are split, and there are partial
    results in float32, up to 129 KiB for each multiprocessor (``triton_split``).

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
    chosen = cut(choices, batch, num_queries, num_keys, processors, value_dim, split=True)
    split = chosen.splits > 1
    written = parts(out, chosen.splits) if split else (out, lse)
    wide = wide_offsets(query, key, value)
    # fmt: off
    with torch.cuda.device_of(query):
        attention_forward_kernel[chosen.grid(batch, num_queries, value_dim)](
            query, key, value, *written, scale, num_queries, num_keys, chosen.span,
            *query.stride(), *key.stride(), *value.stride(),
            **_constants(chosen.tile, dim, value_dim, value_dim, num_keys, wide), SPLIT=split,
        )
        if split:
            join(*written, out, lse)
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
    key_tile = cut(choices.scores, batch, num_keys, num_queries, processors, value_dim).tile
    rows = as_rows if takes_rows(key_tile, shared_memory) else readable
    grad, query, key, value = map(rows, (grad, query, key, value))
    wide = wide_offsets(grad, query, key, value)
    key_both_tile = cut(choices.both, batch, num_keys, num_queries, processors, dim).tile
    query_tile = cut(choices.both, batch, num_queries, num_keys, processors, dim).tile
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
