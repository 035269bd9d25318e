"""Tiles of class_rank_attention's Triton kernels, and why they cannot run on the CPU."""

from __future__ import annotations

import pytest
import torch

import mcibi_fast
from mcibi_fast import ops

pytest.importorskip("triton", reason="needs Triton")

from mcibi_fast.ops.class_rank_attention.tiles import blocks, tiles


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("classes", [1, 64, 65, 128, 129, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_size_has_tiles(dtype: torch.dtype, classes: int, shared_kib: int) -> None:
    for choices in tiles(dtype, classes, shared_kib * 1024):
        assert [t.rows for t in choices] == sorted((t.rows for t in choices), reverse=True)
        assert all(t.rows <= 128 and t.columns <= 128 for t in choices)  # wide_offsets


def test_second_part_of_a_tile() -> None:
    sizes = {128: (128, 0), 129: (128, 16), 150: (128, 32), 192: (128, 64), 193: (256, 0)}
    for dtype, kib in ((torch.bfloat16, 227), (torch.float32, 99)):
        assert {k: blocks(dtype, k, kib * 1024) for k in sizes} == sizes
    assert blocks(torch.bfloat16, 150, 163 * 1024) == (256, 0)


@pytest.mark.parametrize("hard", [False, True])
def test_on_the_cpu_it_says_why_not(hard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = torch.zeros(1, 3, 5)
    text = mcibi_fast.explain(ops.class_rank_attention, rows, rows, scale=1.0, hard=hard)
    assert "triton    no: a tensor is on cpu, not on cuda" in text
    with mcibi_fast.backend("triton"), pytest.raises(ops.BackendError, match="on cpu"):
        ops.class_rank_attention(rows, rows, scale=1.0, hard=hard)
