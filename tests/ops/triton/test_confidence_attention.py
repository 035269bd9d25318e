"""What the host decides for confidence_attention's Triton kernels: tiles, copies, offsets."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

import mcibi_fast
from mcibi_fast.ops.triton_support import triton_missing

pytest.importorskip("triton", reason="needs Triton")

from mcibi_fast.ops import triton_attention as attention_common
from mcibi_fast.ops.confidence_attention.tiles import takes_rows, tiles

FLOAT16 = torch.float16
op = importlib.import_module("mcibi_fast.ops.confidence_attention")  # its function has its name


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = triton_missing(torch.zeros(1, dtype=torch.float64), 16, 512)
    assert reason is not None and "float64" in reason
    reason = triton_missing(torch.zeros(1), 513, 512)
    assert reason is not None and "513" in reason
    reason = triton_missing(torch.zeros(1), 16, 512)
    assert reason is not None and "cpu" in reason
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_missing(torch.zeros(1), 512, 512) is None
    reason = triton_missing(torch.zeros(1, dtype=torch.bfloat16), 16, 512)
    assert reason is not None and "interpreter" in reason


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("channels", [1, 128, 129, 256, 257, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_size_has_tiles(dtype: torch.dtype, channels: int, shared_kib: int) -> None:
    chosen = tiles(dtype, channels, shared_kib * 1024)
    for choices in chosen:
        assert [t.rows for t in choices] == sorted((t.rows for t in choices), reverse=True)
        assert all((t.chunk > 0) == (dtype == torch.float32) for t in choices)


def test_only_unreadable_tensors_are_copied() -> None:
    readable = attention_common.readable
    rows = torch.zeros(2, 33, 64, dtype=FLOAT16)
    columns = torch.zeros(2, 64, 48, dtype=FLOAT16).transpose(1, 2)
    narrow = torch.zeros(2, 19, 33, dtype=FLOAT16).transpose(1, 2)
    for tensor in (rows, rows[:, ::2, :32], columns, narrow):
        assert readable(tensor) is tensor
    odd_columns = torch.zeros(2, 64, 33, dtype=FLOAT16).transpose(1, 2)
    unaligned = torch.zeros(2 * 33 * 64 + 1, dtype=FLOAT16)[1:].view(2, 33, 64)
    for tensor in (odd_columns, unaligned, rows[:, :1].expand(-1, 5, -1)[:, :, ::2]):
        copy = readable(tensor)
        assert copy.is_contiguous() and copy.data_ptr() % 16 == 0 and torch.equal(copy, tensor)


def test_maps_become_rows_where_their_products_would_wait_for_each_other() -> None:
    large, small = tiles(FLOAT16, 256, 227 * 1024).scores
    assert takes_rows(large, 227 * 1024) and not takes_rows(small, 227 * 1024)
    assert not any(takes_rows(t, 163 * 1024) for t in tiles(FLOAT16, 256, 163 * 1024).scores)
    assert not any(takes_rows(t, 227 * 1024) for t in tiles(torch.float32, 256, 1 << 20).scores)
    as_rows = attention_common.as_rows
    rows = torch.randn(2, 33, 64).half()
    assert as_rows(rows) is rows
    map_ = rows.mT.contiguous().mT
    assert as_rows(map_).is_contiguous() and torch.equal(as_rows(map_), rows)


def test_wide_float32_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def why_not(width: int, value_width: int, dtype: torch.dtype, is_cuda: bool = True) -> str:
        query, value = (
            SimpleNamespace(shape=(1, 9, n), dtype=dtype, is_cuda=is_cuda)
            for n in (width, value_width)
        )
        return op._triton_why_not(query, query, value) or ""

    monkeypatch.setattr(op, "triton_missing", lambda *_: None)
    assert "sdpa should be faster" in why_not(256, 256, torch.float32)
    assert "sdpa should be faster" in why_not(16, 128, torch.float32)
    for runs in ((64, 64, torch.float32), (256, 256, FLOAT16), (256, 130, torch.float32)):
        assert why_not(*runs) == ""  # sdpa would form the scores of the last one
    assert why_not(256, 256, torch.float32, is_cuda=False) == ""  # the interpreter
    with mcibi_fast.backend("triton"):
        assert why_not(256, 256, torch.float32) == ""


def test_offsets_are_wide_only_where_needed() -> None:
    wide = attention_common.wide_offsets
    assert not wide(torch.empty(8, 16384, 512, device="meta"))
    assert not wide(torch.empty(1, 512, 2**21, device="meta").transpose(1, 2))
    assert wide(torch.empty(1, 512, 2**22, device="meta").transpose(1, 2))
