"""The C++ kernels of upsample_cross_entropy, through the op, against PyTorch in float64."""

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
from mcibi_fast.ops.compiled import cpu_kernel
from tests.ops.table import label_map, laid_out

if _build.load_extensions()["cpu"] is not None:
    pytest.skip(f"needs _cpu: {_build.load_extensions()['cpu']}", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
# (B, K, h, w) and (H, W): single pixels, tails of vectors, rows and units, up, down and neither.
SIZES = [
    ((1, 1, 1, 1), (1, 1)),
    ((2, 2, 1, 3), (7, 5)),
    ((1, 3, 4, 1), (4, 9)),
    ((2, 8, 5, 6), (40, 48)),
    ((1, 19, 9, 7), (23, 31)),
    ((1, 16, 12, 10), (5, 3)),
    ((2, 33, 6, 5), (6, 5)),
    ((1, 150, 5, 9), (37, 71)),
]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def make(
    size: tuple[int, ...], labels: tuple[int, int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, and a gradient of the losses with zeros; all exact in every dtype."""
    g = torch.Generator().manual_seed(sum(size) + sum(labels))
    logits = (3 * torch.randn(size, generator=g)).bfloat16()
    grad = torch.randn((size[0], *labels), generator=g).bfloat16()
    grad[torch.rand(grad.shape, generator=g) < 0.2] = 0
    return logits.to(dtype), label_map(g, (size[0], *labels), size[1]), grad.to(dtype)


def with_gradient(losses: Tensor, logits: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return losses.detach(), *torch.autograd.grad(losses, logits, grad.to(losses.dtype))


def eager(
    logits: Tensor, labels: Tensor, grad: Tensor, align_corners: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    up = F.interpolate(leaf, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    options.setdefault("ignore_index", 255)
    losses = F.cross_entropy(up, labels.long(), reduction="none", **options)
    return with_gradient(losses, leaf, grad)


def ours(logits: Tensor, labels: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    losses = ops.upsample_cross_entropy(leaf, labels, reduction="none", **options)
    return with_gradient(losses, leaf, grad)


def error(result: Tensor, exact: Tensor) -> float:
    """Relative error in the Euclidean norm; absolute where that is zero."""
    size = float(exact.norm())
    return float((result.double() - exact).norm()) / (size if size > 1e-6 else 1.0)


@pytest.fixture(autouse=True)
def on_the_cpu_kernels() -> Any:
    with mcibi_fast.backend("cpu"):
        yield


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(("size", "labels"), SIZES, ids=str)
@pytest.mark.thinned(together=2)
def test_float64(
    size: tuple[int, ...], labels: tuple[int, int], layout: str, align_corners: bool, poison: None
) -> None:
    logits, known, grad = make(size, labels)
    strided = torch.stack([grad, grad], -1)[..., 1]
    results = ours(
        laid_out(logits, layout), laid_out(known, layout), strided, align_corners=align_corners
    )
    for result, exact in zip(results, eager(logits, known, grad, align_corners), strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12)
    channels_last = results[1].is_contiguous(memory_format=torch.channels_last)
    assert channels_last if layout == "channels_last" else results[1].is_contiguous()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("size", "labels"), SIZES, ids=str)
@pytest.mark.thinned(together=2)
def test_class_weights_and_label_smoothing(
    size: tuple[int, ...], labels: tuple[int, int], weighted: bool, smoothing: float, poison: None
) -> None:
    logits, known, grad = make(size, labels)
    weight = torch.linspace(0, 2, size[1], dtype=torch.float64) if weighted else None
    options = {"weight": weight, "label_smoothing": smoothing}
    truth = eager(logits, known, grad, **options)
    for result, exact in zip(ours(logits, known, grad, **options), truth, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12)
    for reduction in ("sum", "mean"):
        result = ops.upsample_cross_entropy(logits, known, reduction=reduction, **options)
        up = F.interpolate(logits, known.shape[1:], mode="bilinear")
        exact = F.cross_entropy(up, known, ignore_index=255, reduction=reduction, **options)
        if (known == 255).all():
            exact = exact.nan_to_num(0.0)  # PyTorch's mean of no pixel is NaN, ours is 0
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("size", "labels"), SIZES, ids=str)
@pytest.mark.thinned(together=2)
def test_low_precision(
    size: tuple[int, ...], labels: tuple[int, int], dtype: torch.dtype, scale: float, poison: None
) -> None:
    logits, known, grad = make(size, labels, dtype)
    logits = scale * logits
    truth = eager(logits.double(), known, grad.double())
    bars = eager(logits, known, grad)
    for layout in ("contiguous", "channels_last"):
        results = ours(laid_out(logits, layout), known, grad)
        assert results[0].dtype == torch.float32 and results[1].dtype == dtype
        for result, exact, bar in zip(results, truth, bars, strict=True):
            assert error(result, exact) <= 2 * error(bar, exact) + torch.finfo(result.dtype).eps / 2


def test_logits_far_from_zero() -> None:
    """The log-sum-exp of such logits is coarse in float32; loss and gradient are not."""
    logits, known, grad = make((1, 19, 9, 7), (23, 31), torch.float32)
    for shift in (-300.0, 300.0, 3e4):
        truth = eager((logits + shift).double(), known, grad.double())
        bars = eager(logits + shift, known, grad)
        for result, exact, bar in zip(ours(logits + shift, known, grad), truth, bars, strict=True):
            assert error(result, exact) <= 2 * error(bar, exact) + 1e-7


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_label_dtype_and_an_ignored_class(dtype: torch.dtype) -> None:
    logits, known, grad = make((2, 8, 5, 6), (40, 48))
    known = known.where(known != 255, 3)
    # 3 is in [0, K); a class that is ignored stays in the softmax.
    truth = eager(logits, known, grad, ignore_index=3)
    results = ours(logits, known.to(dtype), grad, ignore_index=3)
    for result, exact in zip(results, truth, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12)
    # One that the labels' dtype has not: as uint8, -100 would be 156, and K = 300 be 44.
    many = torch.zeros(2, 300, 3, 3, dtype=torch.float64)
    everywhere = torch.full((2, 9, 9), 7, dtype=dtype)
    loss = ops.upsample_cross_entropy(many, everywhere, ignore_index=-100)
    torch.testing.assert_close(loss.exp(), torch.tensor(300.0, dtype=torch.float64))


def test_all_ignored_is_zero_with_a_zero_gradient(poison: None) -> None:
    logits, known, _ = make((2, 8, 5, 6), (40, 48))
    logits.requires_grad_()
    for weight in (None, torch.ones(8)):
        loss = ops.upsample_cross_entropy(logits, torch.full_like(known, 255), weight=weight)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and not grad.any()


def test_not_a_number_stays_where_it_is_seen() -> None:
    logits, known, grad = make((1, 19, 9, 7), (23, 31))
    for value in (float("nan"), float("inf")):
        logits[0, 4, 4, 3] = value
        truth = eager(logits, known, grad)
        results = ours(logits, known, grad)
        seen = truth[0].isnan()
        assert 0 < seen.sum() < 200
        torch.testing.assert_close(results[0], truth[0], rtol=1e-12, atol=1e-12, equal_nan=True)
        assert results[1][0, :, 4, 3].isnan().any() and not results[1][0, :, :2].isnan().any()


@pytest.mark.parametrize("size", [(16, 12), (72, 50)], ids=str)
def test_logits_of_minus_infinity(size: tuple[int, int]) -> None:
    """A class that is impossible in a region, as masks are made."""
    logits, known, grad = make((1, 19, 9, 7), size)
    logits[0, 4:7, 2:7, 2:6] = float("-inf")
    known[(known >= 4) & (known < 7)] = 0
    truth = eager(logits, known, grad)
    results = ours(logits, known, grad)
    for result, exact in zip(results, truth, strict=True):
        assert exact.isfinite().all()
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12)


def test_zero_times_infinity_is_not_a_number() -> None:
    """As PyTorch has it: interpolating at a source pixel its neighbours count, with weight 0."""
    logits, known, grad = make((1, 19, 9, 7), (9, 7))
    logits[0, 4:7, 2:7, 2:6] = float("-inf")
    known[(known >= 4) & (known < 7)] = 0
    truth = eager(logits, known, grad)[0]
    assert truth.isnan().any()
    losses = ours(logits, known, grad)[0]
    torch.testing.assert_close(losses, truth, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_same_bits_for_any_number_of_threads() -> None:
    logits, known, grad = make((2, 19, 21, 17), (151, 97), torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ours(logits, known, grad))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_the_first_bad_label_is_named_by_both_directions() -> None:
    logits, known, grad = make((2, 8, 5, 6), (40, 48))
    lse = cpu_kernel("upsample_cross_entropy").run(logits, known, None, 255, 0.0, False)[1]
    known[0, 39, 47], known[1, 0, 0], known[1, 0, 1] = 200, 201, 202
    message = r"labels: value 200 at \(b=0, y=39, x=47\)"
    with pytest.raises(ValueError, match=message):
        ops.upsample_cross_entropy(logits, known)
    backward = cpu_kernel("upsample_cross_entropy_backward").run
    with pytest.raises(ValueError, match=message):
        backward(grad, logits, known, lse, None, 255, 0.0, False)


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
logits = torch.randn(1, 150, 64, 64, generator=g).requires_grad_()
labels = torch.randint(0, 150, (1, 512, 512), generator=g).to(torch.uint8)
small = logits[..., :8, :8], labels[:, :64, :64]
def step(logits, labels):
    ops.upsample_cross_entropy(logits, labels).backward()
step(*small)
print(peak_extra_memory(lambda: step(logits, labels), "cpu"))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 16  # 2 MiB of losses, labels as int64, the gradient, tiles
