"""The C++ kernels of upsample_argmax and upsample_confusion, through the ops, against PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mcibi_fast
from mcibi_fast import _build, ops
from tests.ops.table import label_map, laid_out

if _build.load_extensions()["cpu"] is not None:
    pytest.skip(f"needs _cpu: {_build.load_extensions()['cpu']}", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
# (B, K, h, w) and (H, W): single pixels, tails of vectors, groups of rows, up, down and neither.
SIZES = [
    ((1, 1, 1, 1), (1, 1)),
    ((2, 2, 1, 3), (70, 5)),
    ((1, 3, 4, 1), (4, 90)),
    ((2, 8, 5, 6), (40, 48)),
    ((1, 19, 9, 7), (23, 31)),
    ((1, 16, 12, 10), (5, 3)),
    ((2, 33, 6, 5), (6, 5)),
    ((1, 150, 5, 9), (37, 71)),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(size: tuple[int, ...], dtype: torch.dtype = torch.float64, smooth: bool = False) -> Tensor:
    """Logits that are exact in every dtype; smooth ones have few winners."""
    g = torch.Generator().manual_seed(sum(size))
    if smooth:
        ramp = torch.linspace(0, 1, size[3]) * torch.linspace(0, 1, size[2])[:, None]
        slopes = torch.randn(size[:2], generator=g)
        return (20 * slopes[..., None, None] * ramp).bfloat16().to(dtype)
    return torch.randn(size, generator=g).bfloat16().to(dtype)


def upsampled(logits: Tensor, out: tuple[int, int], align_corners: bool = False) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(wide, out, mode="bilinear", align_corners=align_corners)


def assert_wins(prediction: Tensor, values: Tensor, unit: float) -> None:
    """The first of the largest values wins, where no other is within rounding."""
    best = values.amax(1)
    won = values.gather(1, prediction[:, None])[:, 0]
    assert ((best - won) <= 8 * unit * values.abs().amax()).all()
    two = values.topk(min(2, values.shape[1]), 1).values
    clear = (two[:, 0] - two[:, -1]) > 8 * unit * values.abs().amax()
    assert torch.equal(prediction[clear], values.argmax(1)[clear])


@pytest.fixture(autouse=True)
def on_the_cpu_kernels() -> Any:
    with mcibi_fast.backend("cpu"):
        yield


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "out"), SIZES, ids=str)
@pytest.mark.thinned(together=2)
def test_argmax(
    size: tuple[int, ...],
    out: tuple[int, int],
    dtype: torch.dtype,
    layout: str,
    align_corners: bool,
    poison: None,
) -> None:
    for smooth in (False, True):
        logits = make(size, dtype, smooth)
        result = ops.upsample_argmax(laid_out(logits, layout), out, align_corners=align_corners)
        assert result.dtype == torch.int64 and result.shape == (size[0], *out)
        values = upsampled(logits, out, align_corners)
        assert_wins(result, values, torch.finfo(values.dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_equal_classes_wins(dtype: torch.dtype) -> None:
    logits = make((2, 19, 9, 7), dtype)
    doubled = torch.cat([logits, logits], 1)
    result = ops.upsample_argmax(doubled, (71, 50))
    assert torch.equal(result, ops.upsample_argmax(logits, (71, 50)))
    assert not ops.upsample_argmax(torch.zeros_like(logits), (71, 50)).any()
    # Halves and quarters are exact, and so are their ties.
    steps = torch.randint(0, 3, (2, 19, 9, 7), generator=torch.Generator().manual_seed(0))
    values = upsampled(steps.double(), (36, 28))
    first = (values == values.amax(1, keepdim=True)).to(torch.uint8).argmax(1)
    assert torch.equal(ops.upsample_argmax(steps.to(dtype), (36, 28)), first)


def test_nan_is_the_largest() -> None:
    logits = make((1, 19, 9, 7))
    logits[0, 4, 4, 3] = float("nan")
    logits[0, 11, 4, 4] = float("nan")
    values = upsampled(logits, (71, 50))
    assert values.isnan().any()
    assert torch.equal(ops.upsample_argmax(logits, (71, 50)), values.argmax(1))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 3e38])
def test_infinite_and_huge_logits(value: float) -> None:
    for out in ((71, 50), (9, 7)):
        logits = make((1, 19, 9, 7), torch.float32)
        logits[0, 4:7, 2:5, 2:5] = value
        values = upsampled(logits, out)
        assert torch.equal(ops.upsample_argmax(logits, out), values.argmax(1))


def test_classes_that_differ_by_rounding_are_not_lost() -> None:
    """The bound below which a class cannot win has room for the rounding of what may."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(1, 1, 9, 7, generator=g) + 100
    logits = base * (1 + 1e-7 * torch.randint(-3, 4, (1, 19, 9, 7), generator=g))
    assert_wins(ops.upsample_argmax(logits, (71, 50)), upsampled(logits, (71, 50)), 2**-24)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(("size", "out"), SIZES, ids=str)
@pytest.mark.thinned
def test_confusion_counts_the_argmax(
    size: tuple[int, ...], out: tuple[int, int], dtype: torch.dtype, poison: None
) -> None:
    K, logits = size[1], make(size, torch.float32)
    labels = label_map(torch.Generator().manual_seed(1), (size[0], *out), K)
    ignored = 255 if dtype in (torch.uint8, torch.int16, torch.int32, torch.int64) else -1
    labels[labels == 255] = ignored
    if K > 127 and dtype == torch.int8:
        labels = labels.clamp(max=127)
    result = ops.upsample_confusion(
        logits, laid_out(labels.to(dtype), "strided"), K, ignore_index=ignored
    )
    prediction = ops.upsample_argmax(logits, out)
    expected = torch.zeros(K, K, dtype=torch.int64)
    for label, predicted in zip(labels.flatten(), prediction.flatten(), strict=True):
        if label != ignored:
            expected[label, predicted] += 1
    assert torch.equal(result, expected)


def test_same_counts_for_any_number_of_threads() -> None:
    logits = make((3, 19, 21, 17), torch.float32)
    labels = label_map(torch.Generator().manual_seed(1), (3, 151, 97), 19)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ops.upsample_confusion(logits, labels, 19))
    finally:
        torch.set_num_threads(before)
    assert int(results[0].sum()) == int((labels != 255).sum())
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_the_first_bad_label_is_named() -> None:
    labels = torch.zeros(2, 40, 48, dtype=torch.int64)
    labels[0, 39, 47], labels[1, 0, 0] = -7, 201
    with pytest.raises(ValueError, match=r"labels: value -7 at \(b=0, y=39, x=47\)"):
        ops.upsample_confusion(make((2, 8, 5, 6)), labels, 8)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_nothing_of_the_upsampled_size_is_allocated() -> None:
    """Peak resident memory of a process of its own: K x H x W would be 150 MiB."""
    script = """
import torch
from benchmarks.harness import peak_extra_memory
from mcibi_fast import ops
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
logits = torch.randn(1, 150, 64, 64, generator=g)
labels = torch.randint(0, 150, (1, 512, 512), generator=g).to(torch.uint8)
for run in (
    lambda n: ops.upsample_argmax(logits[..., :n, :n], (8 * n, 8 * n)),
    lambda n: ops.upsample_confusion(logits[..., :n, :n], labels[:, : 8 * n, : 8 * n], 150),
):
    run(8)
    print(peak_extra_memory(lambda: run(64), "cpu"))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    argmax, confusion = map(float, done.stdout.split())
    assert argmax < 4  # 2 MiB of it the result
    assert confusion < 2
