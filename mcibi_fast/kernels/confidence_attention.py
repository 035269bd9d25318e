"""Triton kernels of position-confidence attention, Eq. 13 in its general form, one head.

    S = scale Q K^T        P = softmax(S) over the keys        O = P V

The backward pass forms P again from the log-sum-exp of the scores:

    delta = rowsum(dO * O)      dV = P^T dO      dS = P * (dO V^T - delta)
    dQ = scale dS K             dK = scale dS^T Q

This is FlashAttention-2 (Dao 2023, arXiv:2307.08691) but for one thing: dK and dV come from two
kernels. At 256 channels their accumulators together leave room for 64 keys, which a Hopper GPU's
eight warps compute twice over; apart, each takes 128. That is 8 products of matrices for 7, and
no spilled registers.

Every program owns a block of rows of its result and goes through the other side in order: no
atomics, the same bits every run. Nothing of size Nq x Nk is written. Sums, P and dS are float32;
P and dS are rounded to the inputs' dtype for their products.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcibi_fast.kernels.confidence_attention_tiles import Tile, tiles

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# The kernels' arguments are set out by hand: related ones share a line.
# fmt: off
@triton.jit
def _block(count, ROWS: tl.constexpr):
    """The batch entry and the first row of this program's block, of count rows an entry."""
    blocks = tl.cdiv(count, ROWS)
    return (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * ROWS


@triton.jit
def _load(
    ptr, rows, columns, stride_row, stride_column, num_rows,
    NUM_COLUMNS: tl.constexpr, EVEN_ROWS: tl.constexpr, WIDE: tl.constexpr,
):
    """A tile of a matrix with any strides, 0 outside it; WIDE where offsets need 64 bits."""
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    ptrs = ptr + rows[:, None] * stride_row + columns[None, :] * stride_column
    BLOCK: tl.constexpr = columns.shape[0]
    EVEN_COLUMNS: tl.constexpr = NUM_COLUMNS // BLOCK * BLOCK == NUM_COLUMNS
    # No mask but those needed: each costs instructions in the innermost loop.
    if EVEN_ROWS and EVEN_COLUMNS:
        tile = tl.load(ptrs)
    elif EVEN_COLUMNS:
        tile = tl.load(ptrs, mask=rows[:, None] < num_rows, other=0.0)
    else:
        mask = (rows[:, None] < num_rows) & (columns[None, :] < NUM_COLUMNS)
        tile = tl.load(ptrs, mask=mask, other=0.0)
    return tile


@triton.jit
def _store(ptr, tile, rows, columns, num_rows, NUM_COLUMNS: tl.constexpr):
    """Writes what of a tile lies inside a row-major matrix, in the matrix's dtype."""
    ptrs = ptr + rows[:, None] * NUM_COLUMNS + columns[None, :]
    mask = (rows[:, None] < num_rows) & (columns[None, :] < NUM_COLUMNS)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _products_by_chunks(
    a_ptr, b_ptr, a_rows, b_rows, stride_an, stride_ad, stride_bn, stride_bd, num_a, num_b,
    NUM_COLUMNS: tl.constexpr, CHUNK: tl.constexpr, EVEN_B: tl.constexpr, WIDE: tl.constexpr,
):
    """A B^T for a tile of rows of each, CHUNK columns at a time.

    For float32, which no tensor core multiplies exactly: both operands go through registers, and
    whole rows of 256 do not fit there.
    """
    products = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    for start in range(0, NUM_COLUMNS, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        a = _load(a_ptr, a_rows, columns, stride_an, stride_ad, num_a, NUM_COLUMNS, False, WIDE)
        b = _load(b_ptr, b_rows, columns, stride_bn, stride_bd, num_b, NUM_COLUMNS, EVEN_B, WIDE)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
    return products


@triton.jit
def _forward_kernel(
    query_ptr,  # (B, Nq, D)
    key_ptr,  # (B, Nk, D)
    value_ptr,  # (B, Nk, Dv)
    out_ptr,  # (B, Nq, Dv), contiguous
    lse_ptr,  # (B, Nq) float32, contiguous
    scale_log2, num_queries, num_keys,
    stride_qb, stride_qn, stride_qd,
    stride_kb, stride_kn, stride_kd,
    stride_vb, stride_vn, stride_vd,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):
    """O = softmax(scale Q K^T) V for ROWS queries, the softmax online over blocks of keys.

    The scores are kept in units of log 2, so that exp2 serves; lse is the natural logarithm.
    """
    batch, first = _block(num_queries, ROWS)
    queries = tl.arange(0, ROWS)
    keys = tl.arange(0, COLUMNS)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    left = num_queries - first
    query_ptr += batch * stride_qb + first.to(tl.int64) * stride_qn
    key_ptr += batch * stride_kb
    value_ptr += batch * stride_vb
    step = tl.full([], COLUMNS, tl.int64)

    if CHUNK == 0:
        q = _load(query_ptr, queries, d, stride_qn, stride_qd, left, D, False, WIDE)  # (ROWS, D)
    maximum = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for start in range(0, num_keys, COLUMNS):
        keys_left = num_keys - start
        if CHUNK == 0:
            k = _load(key_ptr, keys, d, stride_kn, stride_kd, keys_left, D, EVEN_COLUMNS, WIDE)
            scores = tl.dot(q, tl.trans(k))  # (ROWS, COLUMNS)
        else:
            scores = _products_by_chunks(
                query_ptr, key_ptr, queries, keys, stride_qn, stride_qd, stride_kn, stride_kd,
                left, keys_left, D, CHUNK, EVEN_COLUMNS, WIDE,
            )
        scores *= scale_log2
        if not EVEN_COLUMNS:
            scores = tl.where(keys[None, :] < keys_left, scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        p = tl.exp2(scores - new_maximum[:, None])
        correction = tl.exp2(maximum - new_maximum)
        total = total * correction + tl.sum(p, 1)
        out *= correction[:, None]
        v = _load(value_ptr, keys, dv, stride_vn, stride_vd, keys_left, DV, EVEN_COLUMNS, WIDE)
        out = tl.dot(p.to(v.dtype), v, out, input_precision="ieee")
        maximum = new_maximum
        key_ptr += step * stride_kn
        value_ptr += step * stride_vn

    out /= total[:, None]
    lse = (maximum + tl.log2(total)) * LN2
    _store(out_ptr + (batch * num_queries + first) * DV, out, queries, dv, left, DV)
    tl.store(lse_ptr + batch * num_queries + first + queries, lse, mask=queries < left)


@triton.jit
def _delta_kernel(
    grad_ptr,  # (B, Nq, Dv)
    out_ptr,  # (B, Nq, Dv), contiguous
    delta_ptr,  # (B, Nq) float32, contiguous
    num_queries,
    stride_gb, stride_gn, stride_gd,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):
    """delta = rowsum(dO * O) for ROWS queries."""
    batch, first = _block(num_queries, ROWS)
    queries = tl.arange(0, ROWS)
    dv = tl.arange(0, BLOCK_DV)
    left = num_queries - first
    grad_ptr += batch * stride_gb + first.to(tl.int64) * stride_gn
    out_ptr += (batch * num_queries + first) * DV
    grad = _load(grad_ptr, queries, dv, stride_gn, stride_gd, left, DV, False, WIDE)
    out = _load(out_ptr, queries, dv, DV, 1, left, DV, False, False)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + batch * num_queries + first + queries, delta, mask=queries < left)


@triton.jit
def _value_gradient_kernel(
    query_ptr,  # (B, Nq, D)
    key_ptr,  # (B, Nk, D)
    grad_ptr,  # (B, Nq, Dv)
    lse_ptr,  # (B, Nq) float32, contiguous
    value_grad_ptr,  # (B, Nk, Dv), contiguous
    scale, num_queries, num_keys,
    stride_qb, stride_qn, stride_qd,
    stride_kb, stride_kn, stride_kd,
    stride_gb, stride_gn, stride_gd,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):
    """dV = P^T dO for ROWS keys. Queries past the end have lse = inf, hence P = 0."""
    batch, first = _block(num_keys, ROWS)
    keys = tl.arange(0, ROWS)
    queries = tl.arange(0, COLUMNS)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    left = num_keys - first
    key_ptr += batch * stride_kb + first.to(tl.int64) * stride_kn
    query_ptr += batch * stride_qb
    grad_ptr += batch * stride_gb
    lse_ptr += batch * num_queries
    step = tl.full([], COLUMNS, tl.int64)

    if CHUNK == 0:
        k = _load(key_ptr, keys, d, stride_kn, stride_kd, left, D, False, WIDE)  # (ROWS, D)
    value_grad = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for start in range(0, num_queries, COLUMNS):
        queries_left = num_queries - start
        if CHUNK == 0:
            q = _load(
                query_ptr, queries, d, stride_qn, stride_qd, queries_left, D, EVEN_COLUMNS, WIDE
            )
            scores = tl.dot(k, tl.trans(q))  # (ROWS, COLUMNS), S^T
        else:
            scores = _products_by_chunks(
                key_ptr, query_ptr, keys, queries, stride_kn, stride_kd, stride_qn, stride_qd,
                left, queries_left, D, CHUNK, EVEN_COLUMNS, WIDE,
            )
        lse = tl.load(lse_ptr + queries, mask=queries < queries_left, other=float("inf"))
        p = tl.exp2((scores * scale - lse[None, :]) * LOG2E)
        g = _load(grad_ptr, queries, dv, stride_gn, stride_gd, queries_left, DV, EVEN_COLUMNS, WIDE)
        value_grad = tl.dot(p.to(g.dtype), g, value_grad, input_precision="ieee")
        query_ptr += step * stride_qn
        grad_ptr += step * stride_gn
        lse_ptr += COLUMNS

    _store(value_grad_ptr + (batch * num_keys + first) * DV, value_grad, keys, dv, left, DV)


@triton.jit
def _side_gradient_kernel(
    side_ptr,  # (B, Ns, D): the query for dQ, the key for dK
    other_ptr,  # (B, No, D): the key for dQ, the query for dK
    side_outer_ptr,  # (B, Ns, Dv): dO for dQ, the value for dK
    other_outer_ptr,  # (B, No, Dv): the value for dQ, dO for dK
    lse_ptr,  # (B, Nq) float32, contiguous
    delta_ptr,  # (B, Nq) float32, contiguous
    side_grad_ptr,  # (B, Ns, D), contiguous
    scale, num_side, num_other,
    stride_sb, stride_sn, stride_sd,
    stride_ob, stride_on, stride_od,
    stride_ub, stride_un, stride_ud,
    stride_wb, stride_wn, stride_wd,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, WIDE: tl.constexpr, SIDE_IS_QUERY: tl.constexpr,
):
    """dQ = scale dS K for ROWS queries, or dK = scale dS^T Q for ROWS keys.

    The two differ in whose rows lse and delta belong to. Past the end dS is 0: queries there have
    lse = inf, and the keys' P is masked, because exp2(0 - lse) may be inf.
    """
    batch, first = _block(num_side, ROWS)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    left = num_side - first
    side_ptr += batch * stride_sb + first.to(tl.int64) * stride_sn
    side_outer_ptr += batch * stride_ub + first.to(tl.int64) * stride_un
    other_ptr += batch * stride_ob
    other_outer_ptr += batch * stride_wb
    step = tl.full([], COLUMNS, tl.int64)

    if SIDE_IS_QUERY:
        lse_ptr += batch * num_side + first
        delta_ptr += batch * num_side + first
        lse = tl.load(lse_ptr + rows, mask=rows < left, other=float("inf"))[:, None]
        delta = tl.load(delta_ptr + rows, mask=rows < left, other=0.0)[:, None]
    else:
        lse_ptr += batch * num_other
        delta_ptr += batch * num_other
    if CHUNK == 0:
        a = _load(side_ptr, rows, d, stride_sn, stride_sd, left, D, False, WIDE)
        u = _load(side_outer_ptr, rows, dv, stride_un, stride_ud, left, DV, False, WIDE)
    side_grad = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, num_other, COLUMNS):
        others_left = num_other - start
        b = _load(other_ptr, columns, d, stride_on, stride_od, others_left, D, EVEN_COLUMNS, WIDE)
        if CHUNK == 0:
            w = _load(
                other_outer_ptr, columns, dv, stride_wn, stride_wd, others_left, DV,
                EVEN_COLUMNS, WIDE,
            )
            scores = tl.dot(a, tl.trans(b))  # (ROWS, COLUMNS): S or S^T
            dp = tl.dot(u, tl.trans(w))  # (ROWS, COLUMNS): dP or dP^T
        else:
            scores = _products_by_chunks(
                side_ptr, other_ptr, rows, columns, stride_sn, stride_sd, stride_on, stride_od,
                left, others_left, D, CHUNK, EVEN_COLUMNS, WIDE,
            )
            dp = _products_by_chunks(
                side_outer_ptr, other_outer_ptr, rows, columns,
                stride_un, stride_ud, stride_wn, stride_wd,
                left, others_left, DV, CHUNK, EVEN_COLUMNS, WIDE,
            )
        if not SIDE_IS_QUERY:
            inside = columns < others_left
            lse = tl.load(lse_ptr + columns, mask=inside, other=float("inf"))[None, :]
            delta = tl.load(delta_ptr + columns, mask=inside, other=0.0)[None, :]
            lse_ptr += COLUMNS
            delta_ptr += COLUMNS
        p = tl.exp2((scores * scale - lse) * LOG2E)
        if SIDE_IS_QUERY and not EVEN_COLUMNS:
            p = tl.where(columns[None, :] < others_left, p, 0.0)
        ds = p * (dp - delta)
        side_grad = tl.dot(ds.to(b.dtype), b, side_grad, input_precision="ieee")
        other_ptr += step * stride_on
        other_outer_ptr += step * stride_wn

    side_grad *= scale
    _store(side_grad_ptr + (batch * num_side + first) * D, side_grad, rows, d, left, D)
# fmt: on


DELTA_ROWS = 8


def _constants(tile: Tile, dim: int, value_dim: int, columns: int, wide: bool) -> dict[str, Any]:
    """Compile-time arguments and launch options of a kernel that takes a tile."""
    return {
        "D": dim,
        "DV": value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_DV": max(16, triton.next_power_of_2(value_dim)),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "CHUNK": tile.chunk,
        "EVEN_COLUMNS": columns % tile.columns == 0,
        "WIDE": wide,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


@functools.cache
def _limits(device: torch.device) -> tuple[int, int]:
    """Shared memory a block may have, bytes, and multiprocessors; the interpreter has no limit."""
    if device.type != "cuda":
        return 227 * 1024, 1
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin, properties.multi_processor_count


def _tile(choices: tuple[Tile, ...], batch: int, rows: int, processors: int) -> Tile:
    """The largest tile that gives every multiprocessor a program, else the smallest there is."""
    filling = (t for t in choices if batch * triton.cdiv(rows, t.rows) >= processors)
    return next(filling, choices[-1])


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, or a row-major copy where its memory cannot be read 16 elements at a time.

    Rows or columns may be the contiguous ones: a map (B, D, h, w) seen as (B, N, D) is read in
    place if N is a multiple of 16. Read element by element, the pointers alone would spill a
    kilobyte of registers a thread; a copy of B N D elements is little beside the attention.
    """
    batch, row, column = tensor.stride()
    unit, other = (column, row) if column == 1 else (row, column)
    aligned = unit == 1 and other % 16 == 0 and batch % 16 == 0 and tensor.data_ptr() % 16 == 0
    if aligned or tensor.shape[2] % 16:  # a copy of the latter would be no better
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _wide(*tensors: Tensor) -> bool:
    """Whether an offset inside a tile may not fit 32 bits."""
    return any(128 * t.stride(1) + t.shape[2] * t.stride(2) >= 2**31 for t in tensors)


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
    query, key, value = map(_readable, (query, key, value))
    shared_memory, processors = _limits(query.device)
    choices = tiles(query.dtype, max(dim, value_dim), shared_memory).scores
    tile = _tile(choices, batch, num_queries, processors)
    # fmt: off
    with torch.cuda.device_of(query):
        _forward_kernel[(batch * triton.cdiv(num_queries, tile.rows),)](
            query, key, value, out, lse, scale * LOG2E.value, num_queries, num_keys,
            *query.stride(), *key.stride(), *value.stride(),
            **_constants(tile, dim, value_dim, num_keys, _wide(query, key, value)),
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

    Allocates the three results, delta (B, Nq) in float32, and copies of inputs as in the forward
    pass.

    Args:
        grad: dO, (B, Nq, Dv), any strides.
        query, key, value, scale: what the forward pass took.
        out, lse: what it returned.

    Returns:
        dQ, dK and dV, contiguous, in the shapes and the dtype of query, key and value.
    """
    batch, num_queries, dim = query.shape
    num_keys, value_dim = value.shape[1:]
    query_grad, key_grad, value_grad = (t.new_empty(t.shape) for t in (query, key, value))
    delta = torch.empty_like(lse)
    grad, query, key, value = map(_readable, (grad, query, key, value))
    shared_memory, processors = _limits(query.device)
    choices = tiles(query.dtype, max(dim, value_dim), shared_memory)
    wide = _wide(grad, query, key, value)
    key_tile = _tile(choices.scores, batch, num_keys, processors)
    key_both_tile = _tile(choices.both, batch, num_keys, processors)
    query_tile = _tile(choices.both, batch, num_queries, processors)
    # fmt: off
    with torch.cuda.device_of(query):
        _delta_kernel[(batch * triton.cdiv(num_queries, DELTA_ROWS),)](
            grad, out, delta, num_queries, *grad.stride(),
            DV=value_dim, BLOCK_DV=triton.next_power_of_2(value_dim), ROWS=DELTA_ROWS, WIDE=wide,
            enable_fp_fusion=True,
        )
        _value_gradient_kernel[(batch * triton.cdiv(num_keys, key_tile.rows),)](
            query, key, grad, lse, value_grad, scale, num_queries, num_keys,
            *query.stride(), *key.stride(), *grad.stride(),
            **_constants(key_tile, dim, value_dim, num_queries, wide),
        )
        _side_gradient_kernel[(batch * triton.cdiv(num_keys, key_both_tile.rows),)](
            key, query, value, grad, lse, delta, key_grad, scale, num_keys, num_queries,
            *key.stride(), *query.stride(), *value.stride(), *grad.stride(),
            **_constants(key_both_tile, dim, value_dim, num_queries, wide), SIDE_IS_QUERY=False,
        )
        _side_gradient_kernel[(batch * triton.cdiv(num_queries, query_tile.rows),)](
            query, key, grad, value, lse, delta, query_grad, scale,
            num_queries, num_keys,
            *query.stride(), *key.stride(), *grad.stride(), *value.stride(),
            **_constants(query_tile, dim, value_dim, num_keys, wide), SIDE_IS_QUERY=True,
        )
    # fmt: on
    return query_grad, key_grad, value_grad
