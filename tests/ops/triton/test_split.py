"""How the Triton attention kernels are divided between programs of a GPU."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from mcibi_fast.ops.class_rank_attention import tiles as class_rank
from mcibi_fast.ops.confidence_attention import tiles as confidence
from mcibi_fast.ops.triton_split import cut, parts

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
H200, A100 = (132, 227), (108, 163)  # multiprocessors, KiB of shared memory a block

# Device, B, N, D, dtype; then rows of a tile and parts of the keys in the forward pass, and rows of
# a tile where keys are not split, as for dV.
CHOICES = [
    (H200, 8, 4096, 256, BFLOAT16, (128, 1), 128),
    (H200, 4, 4096, 256, BFLOAT16, (128, 1), 128),
    (H200, 2, 4096, 256, BFLOAT16, (128, 2), 64),
    (H200, 1, 16384, 256, BFLOAT16, (128, 1), 128),
    (H200, 1, 4096, 256, BFLOAT16, (128, 4), 64),
    (H200, 1, 1024, 256, BFLOAT16, (64, 8), 64),
    (H200, 1, 256, 256, BFLOAT16, (64, 1), 64),
    (H200, 1, 1, 256, BFLOAT16, (64, 1), 64),
    (H200, 8, 1024, 256, BFLOAT16, (64, 1), 64),
    (H200, 8, 4096, 512, BFLOAT16, (128, 1), 128),
    (H200, 1, 4096, 512, BFLOAT16, (128, 2), 64),
    (H200, 1, 1024, 512, BFLOAT16, (64, 4), 64),
    (H200, 1, 4096, 128, BFLOAT16, (128, 4), 64),
    (H200, 1, 1024, 64, FLOAT32, (32, 4), 32),
    (A100, 1, 4096, 256, BFLOAT16, (64, 1), 64),
    (A100, 1, 1024, 256, BFLOAT16, (64, 6), 64),
    (A100, 1, 1024, 512, BFLOAT16, (32, 3), 32),
]


@pytest.mark.parametrize(("device", "batch", "n", "d", "dtype", "forward", "rows"), CHOICES)
def test_choice(
    device: tuple[int, int],
    batch: int,
    n: int,
    d: int,
    dtype: torch.dtype,
    forward: tuple[int, int],
    rows: int,
) -> None:
    processors, kib = device
    choices = confidence.tiles(dtype, d, kib * 1024).scores
    chosen = cut(choices, batch, n, n, processors, d, split=True)
    assert (chosen.tile.rows, chosen.splits) == forward
    assert cut(choices, batch, n, n, processors, d).tile.rows == rows


@pytest.mark.parametrize("processors", [1, 7, 132, 1000])
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 1000, 1023, 100_003])
def test_no_part_is_empty_and_each_has_its_own_multiprocessor(
    columns: int, processors: int
) -> None:
    choices = confidence.tiles(BFLOAT16, 512, 227 * 1024).scores
    for batch, rows in product((1, 3), (1, 130, 1000)):
        chosen = cut(choices, batch, rows, columns, processors, 512, split=True)
        assert chosen.span % chosen.tile.columns == 0
        assert (chosen.splits - 1) * chosen.span < columns <= chosen.splits * chosen.span
        blocks, halves, splits = chosen.grid(batch, rows, 512)
        assert halves == 2 and splits == chosen.splits
        assert splits == 1 or blocks * halves * splits <= processors


def test_parts_take_at_most_129_kib_a_multiprocessor() -> None:
    """As the docstrings say, with the widest result of each tile."""
    attention = {**confidence.SIXTEEN_BITS, **{d: {99: t} for d, t in confidence.FLOAT32.items()}}
    classes = {**class_rank.SIXTEEN_BITS, **{k: {99: t} for k, t in class_rank.FLOAT32.items()}}
    sizes = [(d, tile) for d, by in attention.items() for t in by.values() for tile in t.scores]
    sizes += [(k, tile) for k, by in classes.items() for t in by.values() for tile in t.forward]
    for channels, tile in sizes:
        out = torch.empty(1, tile.rows, channels, device="meta", dtype=BFLOAT16)
        programs = tile.grid(1, tile.rows, channels)[1]
        bytes_ = sum(t.numel() * t.element_size() for t in parts(out, 1))
        assert bytes_ <= programs * 129 * 1024
