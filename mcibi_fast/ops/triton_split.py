"""How an attention is divided between the programs of a GPU.

A program takes a tile of rows. Few rows, such as those of one image, are fewer programs than the
GPU has multiprocessors; then the keys are divided, too (flash-decoding, Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Each program then writes, of its rows and
its keys alone, what the softmax online over all keys keeps between two blocks:

    m_s = max S        l_s = rowsum(exp(S - m_s))        A_s = exp(S - m_s) V

and a second kernel joins them, always in the order of the keys:

    m = max m_s        w_s = exp(m_s - m)        O = sum w_s A_s / sum w_s l_s

Maxima and sums, not log-sum-exps: the rounding of a large log-sum-exp would be an error of w_s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcibi_fast.ops.triton_attention import (
    Tile,
    block,
    cdiv,
    exponential,
    log_sum_exp,
    lowest,
    store,
    width,
)


# fmt: off
@triton.jit
def keys_of_program(num_keys, span, SPLIT: tl.constexpr):
    """The first key of this program and the one after its last: all of them, or with SPLIT those of
    its place on the third axis of the grid."""
    if SPLIT:
        begin = tl.program_id(2) * span
        end = tl.minimum(begin + span, num_keys)
    else:
        begin = 0
        end = num_keys
    return begin, end


@triton.jit
def store_statistics(statistics_ptr, maximum, total, rows, inside, part, first, num_rows):
    """Writes m_s and l_s of the rows of a tile that are inside; part = batch * splits + split."""
    statistics_ptr += part * 2 * num_rows + first
    tl.store(statistics_ptr + rows, maximum, mask=inside)
    tl.store(statistics_ptr + num_rows + rows, total, mask=inside)


@triton.jit
def _join_kernel(
    partial_ptr,  # A_s, (B, splits, N, C) float32, contiguous
    statistics_ptr,  # m_s and l_s, (B, splits, 2, N) float32, contiguous
    out_ptr,  # (B, N, C), contiguous
    lse_ptr,  # (B, N) float32, contiguous
    splits, num_rows,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):
    """O and its log-sum-exp for ROWS rows; loads AT_ONCE parts before it needs the first."""
    batch, first = block(num_rows, ROWS)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    left = num_rows - first
    partial_ptr += (batch * splits * num_rows + first) * C
    statistics_ptr += batch * splits * 2 * num_rows + first
    step = tl.full([], num_rows, tl.int64)
    offsets = rows[:, None] * C + columns[None, :]
    whole = (rows[:, None] < left) & (columns[None, :] < C)

    none = lowest(ROWS)
    maximum = none
    for start in range(0, splits, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            split = start + i
            inside = (rows < left) & (split < splits)
            m = tl.load(statistics_ptr + split * 2 * step + rows, mask=inside, other=none)
            maximum = tl.maximum(maximum, m)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, splits, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            split = start + i
            inside = (rows < left) & (split < splits)
            ptrs = statistics_ptr + split * 2 * step + rows
            m = tl.load(ptrs, mask=inside, other=none)
            part_total = tl.load(ptrs + num_rows, mask=inside, other=0.0)
            ptrs = partial_ptr + split * step * C + offsets
            part = tl.load(ptrs, mask=whole & (split < splits), other=0.0)
            weight = exponential(m - maximum)
            total += weight * part_total
            out += weight[:, None] * part

    out /= total[:, None]
    row = batch * num_rows + first
    store(out_ptr + row * C, out, rows, columns, left, C)
    tl.store(lse_ptr + row + rows, log_sum_exp(maximum, total), mask=rows < left)
# fmt: on


class Cut(NamedTuple):
    """How an attention is divided.

    ``tile`` is what a program takes at a time, ``splits`` the number of parts of the columns, of
    ``span`` columns each (the last may have fewer), a multiple of the tile's.
    """

    tile: Tile
    splits: int
    span: int

    def grid(self, batch: int, rows: int, channels: int = 0) -> tuple[int, int, int]:
        """Programs for a result of (batch, rows, channels)."""
        return *self.tile.grid(batch, rows, channels), self.splits


# Estimates, not measured, in the time that a program of eight warps takes for one row and one
# column at 256 channels of bfloat16 on an H200: 0.28 ns.
ALONE = 1.35  # of one group of four warps, whose products wait for its softmax
PARTIAL = 280.0  # for writing and reading a row of a part, 2 KiB
JOIN = 8000.0  # for the second kernel, 2 us


@functools.cache
def cut(
    choices: tuple[Tile, ...],
    batch: int,
    rows: int,
    columns: int,
    processors: int,
    channels: int = 0,
    split: bool = False,
) -> Cut:
    """What is predicted to take least time; of equals the larger tile with fewer parts.

    The columns are divided only while each multiprocessor has at most one program. So the parts
    have at most as many elements as one tile of the result for each multiprocessor.

    Args:
        choices: tiles, from large to small.
        batch, rows, channels: the shape of the result; the channels count for tiles of a part.
        columns: how many a program goes through that has all of them.
        processors: multiprocessors of the device.
        split: whether the columns may be divided.
    """
    every = _cuts(choices, batch, rows, columns, processors, channels, split)
    return min(every, key=lambda a: _time(a, batch, rows, processors, channels))


def _cuts(
    choices: tuple[Tile, ...],
    batch: int,
    rows: int,
    columns: int,
    processors: int,
    channels: int,
    split: bool,
) -> Iterator[Cut]:
    for tile in choices:
        steps = cdiv(columns, tile.columns)
        programs = math.prod(tile.grid(batch, rows, channels))
        most = max(1, min(steps, processors // programs)) if split else 1
        for splits in range(1, most + 1):
            span = cdiv(steps, splits) * tile.columns
            yield Cut(tile, cdiv(columns, span), span)  # no part is empty


def _time(cut: Cut, batch: int, rows: int, processors: int, channels: int) -> float:
    """Of the busiest multiprocessor, in the unit of the estimates."""
    tile, splits, span = cut
    rounds = cdiv(math.prod(cut.grid(batch, rows, channels)), processors)
    each = span * (ALONE if tile.warps < 8 else 1.0)
    if splits == 1:
        return rounds * tile.rows * each
    return rounds * tile.rows * (each + PARTIAL) + JOIN


def parts(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Memory for A_s, (B, splits, N, C), and for m_s and l_s, (B, splits, 2, N), in float32.

    With the splits of ``cut`` at most 128 KiB and 1 KiB for each multiprocessor: tiles of a result
    have at most 128 rows of 256 channels.
    """
    batch, rows, channels = out.shape
    partial = out.new_empty((batch, splits, rows, channels), dtype=torch.float32)
    return partial, out.new_empty((batch, splits, 2, rows), dtype=torch.float32)


JOINED = 2048  # elements of a program's result


def join(partial: Tensor, statistics: Tensor, out: Tensor, lse: Tensor) -> None:
    """Writes the result and the log-sum-exp of all keys, from those of the parts.

    Args:
        partial, statistics: what ``parts`` gave, written.
        out: (B, N, C), contiguous.
        lse: (B, N) float32, contiguous, natural logarithm.
    """
    batch, rows, channels = out.shape
    columns = width(channels)
    each = JOINED // columns
    _join_kernel[(batch * cdiv(rows, each),)](
        partial, statistics, out, lse, partial.shape[1], rows,
        C=channels, BLOCK=columns, ROWS=each, AT_ONCE=4, enable_fp_fusion=True,
    )  # fmt: skip
