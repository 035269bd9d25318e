"""Triton kernels of attention on class weights, Eq. 13 with keys and values W (B, N, K).

    S = scale Q W^T        P = softmax(S) over the keys        O = P W

One tile of W in shared memory serves as keys and as values. The backward pass forms P again as
``confidence_attention/triton.py`` does:

    dS = P * (dO W^T - delta)      dQ = scale dS W      dW = P^T dO + scale dS^T Q

dW is the sum of what W gets as values and as keys, in one accumulator. Exactly, the rows of dS sum
to zero; delta = rowsum(dO * O) is rounded, so they do not. The excess of a row is known once dQ has
been summed up, and excess * O is subtracted from dQ.

Every program owns a block of rows of its result and goes through the other side, or forward a part
of it (``triton_split``), in order: the same bits in every run. Nothing of size N x N is written.
Sums, P and dS are float32; P and dS are rounded to the inputs' dtype for their products.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcibi_fast.ops.class_rank_attention.tiles import blocks, tiles
from mcibi_fast.ops.class_rank_attention.triton_forward import class_rank_forward_kernel
from mcibi_fast.ops.triton_attention import (
    Tile,
    block,
    cdiv,
    constants,
    exponential,
    in_place,
    limits,
    load_parts,
    products_by_chunks,
    products_of_parts,
    row_products,
    scaled,
    store_parts,
    wide_offsets,
)
from mcibi_fast.ops.triton_split import cut, join, parts


# The kernels' arguments are set out by hand: related ones share a line. K is the number of
# classes, PADDED that in the inputs' memory, BLOCK + REST that of a tile, in two parts.
# fmt: off
@triton.jit
def _query_gradient_kernel(
    query_ptr,  # (B, N, PADDED)
    weights_ptr,  # (B, N, PADDED)
    grad_ptr,  # (B, N, PADDED)
    out_ptr,  # (B, N, K), contiguous
    lse_ptr,  # (B, N) float32, contiguous
    inverse_ptr,  # (B, N) float32, contiguous: 1 / Z, written
    delta_ptr,  # (B, N) float32, contiguous, read and written
    query_grad_ptr,  # (B, N, K), contiguous
    scale, num_pixels,
    stride_qb, stride_qn, stride_qk,
    stride_wb, stride_wn, stride_wk,
    stride_gb, stride_gn, stride_gk,
    K: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):
    """dQ = scale dS W for ROWS queries, and delta corrected by the excess.

    P is masked past the last key, because exp(0 - lse) may be inf.
    """
    batch, first = block(num_pixels, ROWS)
    queries = tl.arange(0, ROWS)
    keys = tl.arange(0, COLUMNS)
    left = num_pixels - first
    query_ptr += batch * stride_qb + first.to(tl.int64) * stride_qn
    grad_ptr += batch * stride_gb + first.to(tl.int64) * stride_gn
    weights_ptr += batch * stride_wb
    row = batch * num_pixels + first
    step = tl.full([], COLUMNS, tl.int64)

    lse = tl.load(lse_ptr + row + queries, mask=queries < left, other=float("inf"))
    delta = tl.load(delta_ptr + row + queries, mask=queries < left, other=0.0)
    if CHUNK == 0:
        q, q_rest = load_parts(
            query_ptr, queries, stride_qn, stride_qk, left, PADDED, BLOCK, REST, False, WIDE
        )
        g, g_rest = load_parts(
            grad_ptr, queries, stride_gn, stride_gk, left, PADDED, BLOCK, REST, False, WIDE
        )
    total = tl.zeros([ROWS], tl.float32)  # Z
    excess = tl.zeros([ROWS], tl.float32)  # rowsum(dS)
    query_grad = tl.zeros([ROWS, BLOCK], tl.float32)
    if REST > 0:
        query_grad_rest = tl.zeros([ROWS, REST], tl.float32)
    for start in range(0, num_pixels, COLUMNS):
        keys_left = num_pixels - start
        w, w_rest = load_parts(
            weights_ptr, keys, stride_wn, stride_wk, keys_left, PADDED, BLOCK, REST,
            EVEN_COLUMNS, WIDE,
        )
        if CHUNK == 0:
            scores = products_of_parts(q, q_rest, w, w_rest, REST)  # (ROWS, COLUMNS)
            dp = products_of_parts(g, g_rest, w, w_rest, REST)  # (ROWS, COLUMNS)
        else:
            scores = products_by_chunks(
                query_ptr, weights_ptr, queries, keys, stride_qn, stride_qk, stride_wn, stride_wk,
                left, keys_left, PADDED, CHUNK, EVEN_COLUMNS, WIDE,
            )
            dp = products_by_chunks(
                grad_ptr, weights_ptr, queries, keys, stride_gn, stride_gk, stride_wn, stride_wk,
                left, keys_left, PADDED, CHUNK, EVEN_COLUMNS, WIDE,
            )
        p = exponential(scaled(scores, scale) - lse[:, None])
        if not EVEN_COLUMNS:
            p = tl.where(keys[None, :] < keys_left, p, 0.0)
        total += tl.sum(p, 1)
        ds = p * (dp - delta[:, None])
        excess += tl.sum(ds, 1)
        ds = ds.to(w.dtype)
        query_grad = tl.dot(ds, w, query_grad, input_precision="ieee")
        if REST > 0:
            query_grad_rest = tl.dot(ds, w_rest, query_grad_rest, input_precision="ieee")
        weights_ptr += step * stride_wn

    inverse = 1.0 / total
    tl.store(inverse_ptr + row + queries, inverse, mask=queries < left)
    excess *= inverse
    tl.store(delta_ptr + row + queries, delta + excess, mask=queries < left)
    out, out_rest = load_parts(out_ptr + row * K, queries, K, 1, left, K, BLOCK, REST, False, WIDE)
    query_grad = query_grad * inverse[:, None] - excess[:, None] * out.to(tl.float32)
    rest = query_grad
    if REST > 0:
        rest = query_grad_rest * inverse[:, None] - excess[:, None] * out_rest.to(tl.float32)
    query_grad_ptr += row * K
    store_parts(query_grad_ptr, query_grad * scale, rest * scale, queries, left, K, BLOCK, REST)


@triton.jit
def _weights_gradient_kernel(
    query_ptr,  # (B, N, PADDED)
    weights_ptr,  # (B, N, PADDED)
    grad_ptr,  # (B, N, PADDED)
    lse_ptr,  # (B, N) float32, contiguous
    inverse_ptr,  # (B, N) float32, contiguous: 1 / Z
    delta_ptr,  # (B, N) float32, contiguous
    weights_grad_ptr,  # (B, N, K), contiguous
    scale, unit, num_pixels,
    stride_qb, stride_qn, stride_qk,
    stride_wb, stride_wn, stride_wk,
    stride_gb, stride_gn, stride_gk,
    K: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):
    """dW = P^T dO + scale dS^T Q for ROWS keys. Queries past the end have lse = inf, so P = 0.

    Summed in units of about the scale, a power of two: scaled, dS would underflow in float16.
    """
    batch, first = block(num_pixels, ROWS)
    keys = tl.arange(0, ROWS)
    queries = tl.arange(0, COLUMNS)
    left = num_pixels - first
    weights_ptr += batch * stride_wb + first.to(tl.int64) * stride_wn
    query_ptr += batch * stride_qb
    grad_ptr += batch * stride_gb
    lse_ptr += batch * num_pixels
    inverse_ptr += batch * num_pixels
    delta_ptr += batch * num_pixels
    step = tl.full([], COLUMNS, tl.int64)

    if CHUNK == 0:
        w, w_rest = load_parts(
            weights_ptr, keys, stride_wn, stride_wk, left, PADDED, BLOCK, REST, False, WIDE
        )
    weights_grad = tl.zeros([ROWS, BLOCK], tl.float32)
    if REST > 0:
        weights_grad_rest = tl.zeros([ROWS, REST], tl.float32)
    for start in range(0, num_pixels, COLUMNS):
        queries_left = num_pixels - start
        q, q_rest = load_parts(
            query_ptr, queries, stride_qn, stride_qk, queries_left, PADDED, BLOCK, REST,
            EVEN_COLUMNS, WIDE,
        )
        g, g_rest = load_parts(
            grad_ptr, queries, stride_gn, stride_gk, queries_left, PADDED, BLOCK, REST,
            EVEN_COLUMNS, WIDE,
        )
        if CHUNK == 0:
            scores = products_of_parts(w, w_rest, q, q_rest, REST)  # (ROWS, COLUMNS), S^T
            dp = products_of_parts(w, w_rest, g, g_rest, REST)  # (ROWS, COLUMNS), dP^T
        else:
            scores = products_by_chunks(
                weights_ptr, query_ptr, keys, queries, stride_wn, stride_wk, stride_qn, stride_qk,
                left, queries_left, PADDED, CHUNK, EVEN_COLUMNS, WIDE,
            )
            dp = products_by_chunks(
                weights_ptr, grad_ptr, keys, queries, stride_wn, stride_wk, stride_gn, stride_gk,
                left, queries_left, PADDED, CHUNK, EVEN_COLUMNS, WIDE,
            )
        inside = queries < queries_left
        lse = tl.load(lse_ptr + queries, mask=inside, other=float("inf"))
        inverse = tl.load(inverse_ptr + queries, mask=inside, other=0.0) / unit
        delta = tl.load(delta_ptr + queries, mask=inside, other=0.0)
        p = exponential(scaled(scores, scale) - lse[None, :]) * inverse[None, :]
        ds = p * ((dp - delta[None, :]) * scale)
        if REST == 0:  # one after the other, so that P and dS can have the same shared memory
            weights_grad = tl.dot(p.to(g.dtype), g, weights_grad, input_precision="ieee")
            weights_grad = tl.dot(ds.to(q.dtype), q, weights_grad, input_precision="ieee")
        else:
            p, ds = p.to(g.dtype), ds.to(q.dtype)
            weights_grad = tl.dot(p, g, weights_grad, input_precision="ieee")
            weights_grad = tl.dot(ds, q, weights_grad, input_precision="ieee")
            weights_grad_rest = tl.dot(p, g_rest, weights_grad_rest, input_precision="ieee")
            weights_grad_rest = tl.dot(ds, q_rest, weights_grad_rest, input_precision="ieee")
        query_ptr += step * stride_qn
        grad_ptr += step * stride_gn
        lse_ptr += COLUMNS
        inverse_ptr += COLUMNS
        delta_ptr += COLUMNS

    rest = weights_grad
    if REST > 0:
        rest = weights_grad_rest
    weights_grad_ptr += (batch * num_pixels + first) * K
    store_parts(weights_grad_ptr, weights_grad * unit, rest * unit, keys, left, K, BLOCK, REST)
# fmt: on


def _readable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, or row-major copies of all, zero-padded to a multiple of 16 classes.

    Copies where the memory of one cannot be read 16 elements at a time: the maps (B, K, h, w) seen
    as (B, N, K) can if N is a multiple of 16, rows if K is. A copy is little beside the attention.
    """
    if all(in_place(t) for t in tensors):
        return tensors
    batch, num_pixels, classes = tensors[0].shape
    copies = [t.new_zeros(batch, num_pixels, cdiv(classes, 16) * 16) for t in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy[..., :classes] = tensor
    return tuple(copies)


def _constants(tile: Tile, classes: int, readable: tuple[Tensor, ...]) -> dict[str, Any]:
    shape, dtype = readable[0].shape, readable[0].dtype
    shared_memory, _ = limits(readable[0].device)
    return _constants_of(
        tile, classes, shape[2], shape[1], dtype, shared_memory, wide_offsets(*readable)
    )


@functools.cache
def _constants_of(
    tile: Tile,
    classes: int,
    padded: int,
    num_pixels: int,
    dtype: torch.dtype,
    shared_memory: int,
    wide: bool,
) -> dict[str, Any]:
    part, rest = blocks(dtype, padded, shared_memory)
    sizes = {"K": classes, "PADDED": padded, "BLOCK": part, "REST": rest}
    return {**sizes, **constants(tile, num_pixels, wide)}


def class_rank_attention_forward(
    query: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale Q W^T) W (Eq. 13) and the log-sum-exp of each query's scores.

    Allocates the two results and, where their memory is not readable 16 elements at a time (maps of
    a multiple of 16 pixels and rows of a multiple of 16 classes are), a copy of both inputs. Where
    the queries alone leave multiprocessors idle, the keys are split, and there are partial results
    in float32, up to 129 KiB for each multiprocessor (``triton_split``).

    Args:
        query: Q, (B, N, K), any strides; float32, bfloat16 or float16; K at most 256.
        weights: W, (B, N, K), likewise.
        scale: what the scores are multiplied by.

    Returns:
        (B, N, K), contiguous, in the inputs' dtype; (B, N) float32, natural logarithm.
    """
    batch, num_pixels, classes = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty(batch, num_pixels, dtype=torch.float32)
    inputs = query, weights = _readable(query, weights)
    shared_memory, processors = limits(query.device)
    choices = tiles(query.dtype, classes, shared_memory).forward
    chosen = cut(choices, batch, num_pixels, num_pixels, processors, split=True)
    split = chosen.splits > 1
    written = parts(out, chosen.splits) if split else (out, lse)
    # fmt: off
    with torch.cuda.device_of(query):
        class_rank_forward_kernel[chosen.grid(batch, num_pixels)](
            query, weights, *written, scale, num_pixels, chosen.span,
            *query.stride(), *weights.stride(), **_constants(chosen.tile, classes, inputs),
            SPLIT=split,
        )
        if split:
            join(*written, out, lse)
    # fmt: on
    return out, lse


def class_rank_attention_backward(
    grad: Tensor, query: Tensor, weights: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of query and weights.

    Allocates the two results, two statistics (B, N) in float32, and copies of inputs as in the
    forward pass.

    Args:
        grad: dO, (B, N, K), any strides.
        query, weights, scale: what the forward pass took.
        out, lse: what it returned, or another backend's on the same inputs.

    Returns:
        dQ and dW, contiguous, in the shape and the dtype of query and weights.
    """
    batch, num_pixels, classes = query.shape
    query_grad, weights_grad = query.new_empty(query.shape), query.new_empty(query.shape)
    inverse = torch.empty_like(lse)  # 1 / Z
    inputs = query, weights, grad = _readable(query, weights, grad)
    shared_memory, processors = limits(query.device)
    choices = tiles(query.dtype, classes, shared_memory)
    query_tile = cut(choices.query, batch, num_pixels, num_pixels, processors).tile
    weights_tile = cut(choices.weights, batch, num_pixels, num_pixels, processors).tile
    unit = 2.0 ** min(0, max(-10, math.frexp(scale)[1]))
    strides = *query.stride(), *weights.stride(), *grad.stride()
    # fmt: off
    with torch.cuda.device_of(query):
        delta = row_products(grad[..., :classes], out, query_tile.chunk)
        # dQ first: it writes inverse, which dW reads.
        _query_gradient_kernel[(batch * cdiv(num_pixels, query_tile.rows),)](
            query, weights, grad, out, lse, inverse, delta, query_grad, scale, num_pixels,
            *strides, **_constants(query_tile, classes, inputs),
        )
        _weights_gradient_kernel[(batch * cdiv(num_pixels, weights_tile.rows),)](
            query, weights, grad, lse, inverse, delta, weights_grad, scale, unit, num_pixels,
            *strides, **_constants(weights_tile, classes, inputs),
        )
    # fmt: on
    return query_grad, weights_grad
