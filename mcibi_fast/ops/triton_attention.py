"""What the Triton attention kernels share: tiles of matrices, and on the host their sizes.

The backward pass forms the softmax P again. Where scores are large, a score whose last bits differ
between two kernels is an error of many roundings of P (PyTorch keeps P and does not make it). So
every kernel forms a score by the same chain of sums over the channels, whichever side it takes
first, and P is normalised by the sum of the terms that the backward pass itself forms.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


# The kernels' arguments are set out by hand: related ones share a line.
# fmt: off
@triton.jit
def block(count, ROWS: tl.constexpr):
    """The batch entry and the first row of this program's block, of count rows an entry."""
    blocks = tl.cdiv(count, ROWS)
    return (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * ROWS


@triton.jit
def load(
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
def store(ptr, tile, rows, columns, num_rows, NUM_COLUMNS: tl.constexpr):
    """Writes the part of a tile that lies inside a row-major matrix, in the matrix's dtype."""
    ptrs = ptr + rows[:, None] * NUM_COLUMNS + columns[None, :]
    mask = (rows[:, None] < num_rows) & (columns[None, :] < NUM_COLUMNS)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_parts(
    ptr, rows, stride_row, stride_column, num_rows,
    NUM_COLUMNS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    EVEN_ROWS: tl.constexpr, WIDE: tl.constexpr,
):
    """A tile of whole rows in two parts: BLOCK columns and the REST (0: none, the first again)."""
    FIRST: tl.constexpr = BLOCK if REST > 0 else NUM_COLUMNS
    columns = tl.arange(0, BLOCK)
    part = load(ptr, rows, columns, stride_row, stride_column, num_rows, FIRST, EVEN_ROWS, WIDE)
    rest = part
    if REST > 0:
        columns = BLOCK + tl.arange(0, REST)
        rest = load(
            ptr, rows, columns, stride_row, stride_column, num_rows, NUM_COLUMNS, EVEN_ROWS, WIDE
        )
    return part, rest


@triton.jit
def products_of_parts(a, a_rest, b, b_rest, REST: tl.constexpr):
    """A B^T for rows in two parts, summed over the columns in their order."""
    products = tl.dot(a, tl.trans(b), input_precision="ieee")
    if REST > 0:
        products = tl.dot(a_rest, tl.trans(b_rest), products, input_precision="ieee")
    return products


@triton.jit
def store_parts(
    ptr, part, rest, rows, num_rows,
    NUM_COLUMNS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):
    """Writes what ``load_parts`` would read of a row-major matrix."""
    store(ptr, part, rows, tl.arange(0, BLOCK), num_rows, NUM_COLUMNS)
    if REST > 0:
        store(ptr, rest, rows, BLOCK + tl.arange(0, REST), num_rows, NUM_COLUMNS)


@triton.jit
def products_by_chunks(
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
        a = load(a_ptr, a_rows, columns, stride_an, stride_ad, num_a, NUM_COLUMNS, False, WIDE)
        b = load(b_ptr, b_rows, columns, stride_bn, stride_bd, num_b, NUM_COLUMNS, EVEN_B, WIDE)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
    return products


# The blocks of channels are whole rows, but PART is those of the result: the second axis of the
# grid takes the others.
@triton.jit
def channels_of_result(BLOCK: tl.constexpr, PART: tl.constexpr):
    """Those that this program computes."""
    channels = tl.arange(0, PART)
    if PART < BLOCK:
        channels += tl.program_id(1) * PART
    return channels


@triton.jit
def of_first_part(inside, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Which rows this program writes of what the programs of all parts compute."""
    if PART < BLOCK:
        inside &= tl.program_id(1) == 0
    return inside


@triton.jit
def scaled(products, scale):
    """The scores: products times the scale, rounded by itself in every kernel.

    A multiplication and a subtraction the compiler would round once, and a large score less its own
    maximum would then not be 0 but what the maximum lost when it was rounded.
    """
    return tl.fma(products, scale, 0.0)


@triton.jit
def exponential(x):
    """exp(x)."""
    # A constant of the module would be compared at each launch with what it was when the kernel was
    # compiled, which takes the host microseconds.
    LOG2E: tl.constexpr = 1.4426950408889634
    return tl.exp2(x * LOG2E)


@triton.jit
def log_sum_exp(maximum, total):
    """maximum + ln(total)."""
    LN2: tl.constexpr = 0.6931471805599453
    return maximum + tl.log2(total) * LN2


@triton.jit
def lowest(ROWS: tl.constexpr):
    """The running maximum of an online softmax before its first score.

    With -inf, scores that are all -inf would be less than it by NaN.
    """
    return tl.full([ROWS], -3.4028234663852886e38, tl.float32)


@triton.jit
def _delta_kernel(
    grad_ptr,  # (B, Nq, Dv)
    out_ptr,  # (B, Nq, Dv), contiguous
    delta_ptr,  # (B, Nq) float32, contiguous
    num_queries,
    stride_gb, stride_gn, stride_gd,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """delta = rowsum(dO * O) for ROWS queries: the diagonal of dO O^T.

    A product of matrices, for its order of summation: where a query has one key, O is that key's
    value, and dP - delta then is 0 exactly.
    """
    batch, first = block(num_queries, ROWS)
    queries = tl.arange(0, ROWS)
    dv = tl.arange(0, BLOCK_DV)
    left = num_queries - first
    grad_ptr += batch * stride_gb + first.to(tl.int64) * stride_gn
    out_ptr += (batch * num_queries + first) * DV
    if CHUNK == 0:
        grad = load(grad_ptr, queries, dv, stride_gn, stride_gd, left, DV, False, WIDE)
        out = load(out_ptr, queries, dv, DV, 1, left, DV, False, False)
        products = tl.dot(grad, tl.trans(out), input_precision="ieee")
    else:
        products = products_by_chunks(
            grad_ptr, out_ptr, queries, queries, stride_gn, stride_gd, DV, 1, left, left,
            DV, CHUNK, False, WIDE,
        )
    delta = tl.sum(tl.where(queries[:, None] == queries[None, :], products, 0.0), 1)
    tl.store(delta_ptr + batch * num_queries + first + queries, delta, mask=queries < left)
# fmt: on


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's functions of this kind take the host microseconds."""
    return -(-a // b)


class Tile(NamedTuple):
    """What one program computes: ``rows`` rows of its result, ``columns`` rows of the other side at
    a time.

    ``chunk`` is the number of channels that a product of scores takes at a time; 0 for all, which
    are then kept in shared memory. ``part`` is the number of channels of its result; 0 for all.
    Programs for other channels form the same scores again.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    chunk: int = 0
    part: int = 0

    def grid(self, batch: int, rows: int, channels: int) -> tuple[int, int]:
        """Programs for a result of (batch, rows, channels)."""
        parts = cdiv(channels, self.part) if self.part else 1
        return batch * cdiv(rows, self.rows), parts


@functools.cache
def limits(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory of a block, and multiprocessors; the interpreter has no limit."""
    if device.type != "cuda":
        return 227 * 1024, 1
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin, properties.multi_processor_count


def in_place(tensor: Tensor) -> bool:
    """Whether the memory of a (B, N, D) tensor can be read 16 elements at a time.

    Rows or columns may be the contiguous ones: a map (B, D, h, w) seen as (B, N, D) can if N is a
    multiple of 16, rows if D is.
    """
    batch, row, column = tensor.stride()
    unit, other = (column, row) if column == 1 else (row, column)
    aligned = unit == 1 and other % 16 == 0 and batch % 16 == 0 and tensor.data_ptr() % 16 == 0
    return aligned and (row == 1 or tensor.shape[2] % 16 == 0)


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a row-major copy where its memory cannot be read 16 elements at a time.

    Read element by element, the pointers alone would spill a kilobyte of registers per thread; a
    copy of B N D elements costs little compared with the attention.
    """
    if in_place(tensor) or tensor.shape[2] % 16:  # a copy of the latter would be no better
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def as_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a row-major copy where its columns are the contiguous ones, as in a map."""
    tensor = readable(tensor)
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def wide_offsets(*tensors: Tensor) -> bool:
    """Whether an offset inside a tile may not fit 32 bits."""
    for tensor in tensors:
        _, row, column = tensor.stride()
        if 128 * row + tensor.shape[2] * column >= 2**31:
            return True
    return False


def width(channels: int) -> int:
    """The columns of a tile that holds so many channels: a power of two, as its products need."""
    return max(16, 1 << (channels - 1).bit_length())


def constants(tile: Tile, columns: int, wide: bool) -> dict[str, Any]:
    """Compile-time arguments and launch options of a kernel that goes through so many columns."""
    return {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "CHUNK": tile.chunk,
        "EVEN_COLUMNS": columns % tile.columns == 0,
        "WIDE": wide,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


DELTA_ROWS = 16  # the fewest that tl.dot takes


def row_products(grad: Tensor, out: Tensor, chunk: int) -> Tensor:
    """delta = rowsum(dO * O), (B, Nq) in float32.

    Args:
        grad: dO, (B, Nq, Dv), any strides.
        out: O, (B, Nq, Dv), contiguous.
        chunk: as in the tile of the kernel that forms dP.
    """
    batch, num_queries, value_dim = out.shape
    delta = out.new_empty(batch, num_queries, dtype=torch.float32)
    _delta_kernel[(batch * cdiv(num_queries, DELTA_ROWS),)](
        grad, out, delta, num_queries, *grad.stride(),
        DV=value_dim, BLOCK_DV=width(value_dim), ROWS=DELTA_ROWS, CHUNK=chunk,
        WIDE=wide_offsets(grad), enable_fp_fusion=True,
    )  # fmt: skip
    return delta
