"""The CUDA kernels of upsample_cross_entropy, run by the host executor, against PyTorch in
float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from tests.csrc import host_kernels
from tests.csrc.memory_update_host import INTEGERS, LABEL_OPS
from tests.csrc.upsample_cross_entropy_host import UpsampleCrossEntropyHost, wide
from tests.ops.test_all_ops import error as relative_error

OP = "upsample_cross_entropy"
SHAPES = {  # B, K, h, w, H, W
    "8x": (2, 7, 4, 9, 32, 72),
    "odd": (1, 19, 5, 7, 37, 51),
    "one of all": (1, 1, 1, 1, 1, 1),
    "one source pixel": (2, 3, 1, 1, 21, 26),
    "one output pixel": (1, 5, 6, 7, 1, 1),
    "smaller": (2, 4, 17, 23, 5, 11),
    "smaller rows, larger columns": (1, 6, 11, 5, 7, 41),
    "same": (1, 33, 9, 13, 9, 13),
    "same width": (1, 5, 4, 13, 23, 13),
    "barely larger": (1, 5, 12, 13, 13, 15),
    "wide": (1, 3, 2, 131, 9, 400),
    "tall cells": (1, 3, 2, 3, 61, 70),
    "more classes than a patch": (1, 150, 3, 12, 10, 71),
    "more classes than a group": (1, 301, 3, 4, 7, 9),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def ops(compile_cache: Path) -> UpsampleCrossEntropyHost:
    return UpsampleCrossEntropyHost(host_kernels.load(compile_cache, OP))


@pytest.fixture(scope="module")
def race_checked(compile_cache: Path) -> UpsampleCrossEntropyHost:
    return UpsampleCrossEntropyHost(host_kernels.load(compile_cache, OP, races=True))


def _draw(
    shape: tuple[int, ...], generator: Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which a part is ignored (-1), and a cotangent of the losses."""
    B, K, h, w, H, W = shape
    logits = 4 * torch.randn(B, K, h, w, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K, (B, H, W), generator=generator, dtype=torch.int64)
    ignored = torch.rand(B, H, W, generator=generator) < 0.2
    cotangent = torch.randn(B, H, W, generator=generator, dtype=wide(dtype))
    return logits.to(dtype), labels.masked_fill(ignored, -1), cotangent


def _pytorch(
    logits: Tensor,
    labels: Tensor,
    cotangent: Tensor,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """losses, lse and the gradient of the logits, computed in dtype."""
    logits = logits.to(dtype).requires_grad_()
    size = labels.shape[-2:]
    upsampled = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    losses = F.cross_entropy(
        upsampled,
        labels,
        None if weight is None else weight.to(dtype),
        ignore_index=-1,
        label_smoothing=smoothing,
        reduction="none",
    )
    (grad,) = torch.autograd.grad(losses, logits, cotangent.to(dtype))
    lse = upsampled.detach().logsumexp(1).masked_fill(labels == -1, 0)
    return losses.detach(), lse, grad


def _error(value: Tensor, exact: Tensor) -> float:
    assert value.isfinite().all()
    return float((value.double() - exact).abs().max())


def _assert_as_good_as_pytorch(
    value: Tensor, pytorch: Tensor, exact: Tensor, largest_term: float = 0.0
) -> None:
    """At most twice the error of PyTorch in the same precision, as a whole; and nowhere more than
    that and a few roundings of what is added up. In float64, where PyTorch is the reference, only
    some roundings."""
    roundings = 100 if value.dtype == torch.float64 else 4
    scale = max(float(exact.abs().max()), largest_term)
    rounding = roundings * torch.finfo(value.dtype).eps * scale
    assert _error(value, exact) <= 2 * _error(pytorch, exact) + rounding
    if value.dtype != torch.float64:
        unit = torch.finfo(value.dtype).eps / 2
        assert relative_error(value, exact) <= 2 * relative_error(pytorch, exact) + unit


def _lse(statistic: Tensor) -> Tensor:
    """The log-sum-exp of each pixel from its largest logit and the sum relative to it."""
    largest, sum_ = statistic
    return largest + sum_.log()


def _check(
    ops: UpsampleCrossEntropyHost,
    drawn: tuple[Tensor, Tensor, Tensor],
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    align_corners: bool = False,
) -> None:
    logits, labels, cotangent = drawn
    options = (weight, smoothing, align_corners)
    exact = _pytorch(*drawn, torch.float64, *options)
    pytorch = _pytorch(*drawn, wide(logits.dtype), *options)
    host = (weight, -1, smoothing, align_corners)
    losses, statistic = ops.upsample_cross_entropy(logits, labels, *host)
    grad = ops.upsample_cross_entropy_backward(cotangent, logits, labels, statistic, *host)
    assert grad.stride() == logits.stride()
    assert not losses[labels == -1].any()
    assert not _lse(statistic)[labels == -1].any()
    _assert_as_good_as_pytorch(losses, pytorch[0], exact[0])
    _assert_as_good_as_pytorch(_lse(statistic), pytorch[1], exact[1])
    rounded = pytorch[2].to(grad.dtype)
    _assert_as_good_as_pytorch(grad, rounded, exact[2], float(cotangent.abs().max()))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.thinned(together=2)
def test_losses_and_gradient(
    ops: UpsampleCrossEntropyHost,
    generator: Generator,
    name: str,
    dtype: torch.dtype,
    align_corners: bool,
) -> None:
    logits, labels, cotangent = _draw(SHAPES[name], generator, dtype)
    if align_corners:
        logits = logits.contiguous(memory_format=torch.channels_last)
    _check(ops, (logits, labels, cotangent), align_corners=align_corners)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["odd", "smaller", "tall cells"])
@pytest.mark.thinned(together=2)
def test_weight_and_label_smoothing(
    ops: UpsampleCrossEntropyHost,
    generator: Generator,
    name: str,
    dtype: torch.dtype,
    weighted: bool,
    smoothing: float,
) -> None:
    drawn = _draw(SHAPES[name], generator, dtype)
    weight = torch.rand(SHAPES[name][1], generator=generator, dtype=dtype) if weighted else None
    _check(ops, drawn, weight, smoothing)


@pytest.mark.parametrize("factor", [0.1, 1.0, 100.0])
def test_labels_in_regions(
    ops: UpsampleCrossEntropyHost, generator: Generator, factor: float
) -> None:
    """Whole columns of pixels that count and have one label, so that most classes have no label
    nearby; some that are ignored; and classes that lead by far."""
    logits, labels, cotangent = _draw((2, 150, 4, 9, 32, 72), generator)
    labels = labels[:, ::16, ::24].clamp(min=0)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(24, 2)
    labels[1, 5, :30] = -1
    _check(ops, (logits * factor, labels, cotangent))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_label_dtypes_and_strides(
    ops: UpsampleCrossEntropyHost, generator: Generator, dtype: torch.dtype
) -> None:
    logits, labels, cotangent = _draw(SHAPES["8x"], generator)
    labels = labels.masked_fill(labels < 0, 100)

    def run(labels: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        losses, statistic = ops.upsample_cross_entropy(logits, labels, None, 100)
        grad = ops.upsample_cross_entropy_backward(cotangent, logits, labels, statistic, None, 100)
        return losses, statistic, grad

    expected = run(labels, cotangent)
    labels = labels.to(dtype)
    shifted = torch.empty(2, 33, 200, dtype=dtype)[:, 1:, 5:149:2].copy_(labels)
    transposed = labels.transpose(0, 2).contiguous().transpose(0, 2)
    for view in (labels, shifted, transposed):
        assert all(torch.equal(a, b) for a, b in zip(run(view, cotangent), expected, strict=True))
    transposed = cotangent.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(run(labels, transposed)[2], expected[2])
    constant = torch.tensor(0.25).expand(labels.shape)  # what the backward of a sum gives
    assert torch.equal(run(labels, constant)[2], run(labels, constant.contiguous())[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["8x", "smaller"])
def test_logit_strides_and_offsets(
    ops: UpsampleCrossEntropyHost, generator: Generator, name: str, dtype: torch.dtype
) -> None:
    logits, labels, cotangent = _draw(SHAPES[name], generator, dtype)
    B, K, h, w = logits.shape
    views = [
        logits,
        logits.contiguous(memory_format=torch.channels_last),
        logits.transpose(2, 3).contiguous().transpose(2, 3),
        logits.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        torch.full((B, K + 3, h + 2, w + 5), torch.inf, dtype=dtype)[:, 1:-2, 2:, 4:-1],
        torch.empty(logits.numel() + 3, dtype=dtype)[3:].view(logits.shape),
        torch.empty(B, h, w, 2 * K, dtype=dtype)[..., ::2].permute(0, 3, 1, 2),
    ]
    results = []
    for view in views:
        view.copy_(logits)
        losses, statistic = ops.upsample_cross_entropy(view, labels, None, -1)
        grad = ops.upsample_cross_entropy_backward(cotangent, view, labels, statistic, None, -1)
        results.append((losses, statistic, grad))
    for found in results:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


def test_offsets_beyond_32_bits(ops: UpsampleCrossEntropyHost, generator: Generator) -> None:
    logits, labels, cotangent = _draw((2, 4, 4, 4, 16, 16), generator, torch.bfloat16)
    labels = labels.masked_fill(labels < 0, 255).to(torch.uint8)
    far = (
        2**31 + 64
    )  # elements from the first image to the second; the pages between stay untouched
    try:
        storage = torch.empty(far + 256, dtype=torch.bfloat16)
        label_storage = torch.empty(far + 256, dtype=torch.uint8)
    except RuntimeError:
        pytest.skip("needs 6.5 GB of address space")
    far_logits = storage.as_strided(logits.shape, (far, 16, 4, 1)).copy_(logits)
    far_labels = label_storage.as_strided(labels.shape, (far, 16, 1)).copy_(labels)
    near = ops.upsample_cross_entropy(logits, labels)
    found = ops.upsample_cross_entropy(far_logits, far_labels)
    assert all(torch.equal(a, b) for a, b in zip(found, near, strict=True))
    expected = ops.upsample_cross_entropy_backward(cotangent, logits, labels, near[1])
    grad = ops.upsample_cross_entropy_backward(cotangent, far_logits, far_labels, near[1])
    assert torch.equal(grad, expected)


def test_bad_labels_are_flagged_and_contribute_nothing(
    ops: UpsampleCrossEntropyHost, generator: Generator
) -> None:
    logits, labels, cotangent = _draw(SHAPES["more classes than a group"], generator)
    weight = torch.rand(301, generator=generator)
    for bad in (301, -2, -(2**40), 2**33):
        broken = labels.masked_fill(labels < 0, bad)
        options = (weight, -1, 0.2, True)
        losses, statistic = ops.upsample_cross_entropy(logits, labels, *options)
        grad = ops.upsample_cross_entropy_backward(cotangent, logits, labels, statistic, *options)
        flag = torch.zeros(3, dtype=torch.int64)
        found = ops.upsample_cross_entropy(logits, broken, *options, flag)
        assert torch.equal(found[0], losses)
        assert torch.equal(found[1], statistic)
        count = int((broken == bad).sum())
        assert flag.tolist() == [count, bad, LABEL_OPS.index("upsample_cross_entropy")]
        found = ops.upsample_cross_entropy_backward(
            cotangent, logits, broken, statistic, *options, flag
        )
        assert torch.equal(found, grad)
        assert flag.tolist() == [
            2 * count,
            bad,
            LABEL_OPS.index("upsample_cross_entropy"),
        ]  # once more; the first stays


def test_nothing_but_ignored_pixels(ops: UpsampleCrossEntropyHost, generator: Generator) -> None:
    logits, labels, cotangent = _draw(SHAPES["odd"], generator)
    logits *= 100  # exp(logit) overflows, and is not multiplied by zero
    labels.fill_(3)  # a class, and ignored
    flag = torch.zeros(3, dtype=torch.int64)
    losses, statistic = ops.upsample_cross_entropy(logits, labels, None, 3, flag=flag)
    grad = ops.upsample_cross_entropy_backward(
        cotangent, logits, labels, statistic, None, 3, flag=flag
    )
    assert not losses.any()
    assert not _lse(statistic).any()
    assert not grad.any()
    assert not flag.any()


@pytest.mark.parametrize("factor", [1e-3, 25.0, 250.0, 2.5e8, 1e30])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["8x", "smaller", "same", "more classes than a patch"])
@pytest.mark.thinned(together=2)
def test_logits_of_any_scale(
    ops: UpsampleCrossEntropyHost, generator: Generator, name: str, smoothing: float, factor: float
) -> None:
    """The saved statistic must not round the probabilities, nor a difference of logits overflow."""
    logits, labels, cotangent = _draw(SHAPES[name], generator)
    _check(ops, ((logits * factor).float(), labels, cotangent), None, smoothing)


@pytest.mark.parametrize("name", ["8x", "smaller"])
def test_large_logits(ops: UpsampleCrossEntropyHost, generator: Generator, name: str) -> None:
    """Neither overflow nor, where a class leads by far, underflow of all the others."""
    logits, labels, cotangent = _draw(SHAPES[name], generator)
    _check(ops, (logits * 500 + 3000, labels, cotangent))
    _check(ops, (logits + 3000, labels, cotangent), None, 0.1)


def test_a_class_that_is_masked(ops: UpsampleCrossEntropyHost, generator: Generator) -> None:
    """Logits of -inf, where nothing is interpolated."""
    logits, labels, cotangent = _draw(SHAPES["same"], generator)
    logits[:, 5:7] = -torch.inf
    labels = labels.masked_fill((labels == 5) | (labels == 6), 0)
    exact = logits.double().requires_grad_()
    right = F.cross_entropy(exact, labels, ignore_index=-1, reduction="none")
    (right_grad,) = torch.autograd.grad(right, exact, cotangent.double())
    losses, statistic = ops.upsample_cross_entropy(logits, labels, None, -1)
    grad = ops.upsample_cross_entropy_backward(cotangent, logits, labels, statistic, None, -1)
    assert _error(losses, right.detach()) <= 1e-5
    assert _error(grad, right_grad) <= 1e-5


def test_a_nan_reaches_the_pixels_around_it_alone(
    ops: UpsampleCrossEntropyHost, generator: Generator
) -> None:
    logits, labels, _ = _draw(SHAPES["8x"], generator)
    labels = labels.clamp(min=0)
    logits[0, 3, 2, 4] = torch.nan
    losses, statistic = ops.upsample_cross_entropy(logits, labels, None, -1)
    upsampled = F.interpolate(logits, labels.shape[-2:], mode="bilinear")
    assert torch.equal(losses.isnan(), upsampled.isnan().any(1))
    assert torch.equal(_lse(statistic).isnan(), upsampled.isnan().any(1))


def test_scratch_is_a_few_gradients(ops: UpsampleCrossEntropyHost) -> None:
    for K, size, scale, most in [(19, 64, 8, 1.3), (150, 64, 8, 1.45), (150, 32, 16, 2.0)]:
        logits = torch.empty(1, K, size, size).expand(8, -1, -1, -1)
        labels = torch.empty(1, 1, 1).expand(8, scale * size, scale * size).to(torch.uint8)
        assert ops.bytes_of("backward_scratch", logits, labels) <= most * 4 * logits.numel()


def _all_kernels(ops: UpsampleCrossEntropyHost, generator: Generator) -> Callable[[], list[Tensor]]:
    """Inputs that take every path: several patches, stages and passes, and the borders of tiles."""
    inputs = []
    for shape in [(1, 130, 3, 4, 7, 9), (1, 3, 6, 12, 19, 100), (1, 3, 2, 3, 37, 20)]:
        inputs.append(_draw(shape, generator))
    logits, labels, cotangent = _draw((1, 20, 3, 4, 2, 5), generator, torch.bfloat16)
    inputs.append((logits.contiguous(memory_format=torch.channels_last), labels, cotangent))

    def run() -> list[Tensor]:
        results = []
        for logits, labels, cotangent in inputs:
            losses, statistic = ops.upsample_cross_entropy(logits, labels, None, -1, 0.1)
            results += [losses, statistic]
            options = (logits, labels, statistic.nan_to_num(), None, -1, 0.1)
            results.append(ops.upsample_cross_entropy_backward(cotangent, *options))
            if not ops.bytes_of("reduced_sums", logits, labels):
                continue
            for smoothing in (0.0, 0.1):
                options = (None, -1, smoothing)
                loss, sums = ops.upsample_cross_entropy_reduced(logits, labels, *options)
                grad = ops.upsample_cross_entropy_gather(loss, sums, logits, labels)
                results += [loss, grad]
        return results

    return run


def test_same_bits_in_any_order_of_threads(
    ops: UpsampleCrossEntropyHost, generator: Generator
) -> None:
    run = _all_kernels(ops, generator)
    expected = run()
    for seed in range(1, 5):
        ops.kernels.set_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    ops.kernels.set_seed(0)


def test_every_barrier_is_needed(ops: UpsampleCrossEntropyHost, generator: Generator) -> None:
    run = _all_kernels(ops, generator)
    host_kernels.assert_every_site_is_needed(OP, ops.kernels, run, range(8))


@pytest.mark.slow
def test_no_races(race_checked: UpsampleCrossEntropyHost, generator: Generator) -> None:
    """Every memory access of every kernel; and without any one barrier there is a race."""
    run = _all_kernels(race_checked, generator)
    host_kernels.assert_every_site_is_needed(OP, race_checked.kernels, run, range(1))


@pytest.mark.slow
def test_binding(compile_cache: Path) -> None:
    """Registration, checks and allocation, in a process of its own: it registers the operators."""
    library = host_kernels.build_binding(compile_cache, OP)
    worker = Path(__file__).with_name(f"{OP}_binding_worker.py")
    command = [sys.executable, str(worker), str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Of exact weights, so that 0 times infinity is where PyTorch has it.
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [SHAPES["8x"], SHAPES["same"], (1, 150, 3, 12, 12, 48)], ids=str)
def test_losses_of_any_logits_are_pytorchs(
    ops: UpsampleCrossEntropyHost, generator: Generator, shape: tuple[int, ...], smoothing: float
) -> None:
    """Scales from 1e-3 to 1e30, infinities, NaN, and nothing but the lowest numbers."""
    logits, labels, cotangent = _draw(shape, generator, torch.float64)
    labels = labels.clamp(min=0)  # PyTorch multiplies the NaN of ignored pixels by 0
    some = torch.rand(logits.shape, generator=generator)
    cases = [logits * scale for scale in (1e-3, 1.0, 1e3, 1e9, 1e30)]
    cases += [logits.masked_fill(some < 0.03, value) for value in (-torch.inf, torch.inf)]
    cases += [logits.masked_fill(some < 0.03, torch.nan), torch.full_like(logits, -3e38)]
    cases += [torch.full_like(logits, -torch.inf)]
    for case in cases:
        size = labels.shape[-2:]
        leaf = case.float().double().requires_grad_()
        upsampled = leaf  # where nothing is interpolated, nothing is multiplied by 0
        if size != case.shape[-2:]:
            upsampled = F.interpolate(leaf, size, mode="bilinear")
        if (case == case.flatten()[0]).all():  # without the rounding of the weights, times 3e38
            upsampled = upsampled - (upsampled - case.flatten()[0]).detach().nan_to_num()
        right = F.cross_entropy(upsampled, labels, label_smoothing=smoothing, reduction="none")
        (right_grad,) = torch.autograd.grad(right, leaf, cotangent)
        right, upsampled = right.detach(), upsampled.detach()
        options = (None, -1, smoothing)
        losses, statistic = ops.upsample_cross_entropy(case.float(), labels, *options)
        grad = ops.upsample_cross_entropy_backward(
            cotangent.float(), case.float(), labels, statistic, *options
        )
        assert torch.equal(losses.isnan(), right.isnan())
        finite = right.isfinite()
        assert torch.equal(losses.isfinite(), finite)
        # A loss is a difference of logits, which are rounded.
        numbers = upsampled.nan_to_num(0, 0, 0)
        spread = float((numbers - numbers[:, :1]).abs().max())
        torch.testing.assert_close(
            losses[finite].double(), right[finite], rtol=1e-5, atol=1e-5 * max(spread, 1.0)
        )
        assert torch.equal(grad.isnan(), right_grad.isnan())
        assert not grad.isinf().any()


def test_pixels_that_do_not_count_may_have_any_logits(
    ops: UpsampleCrossEntropyHost, generator: Generator
) -> None:
    """Ignored, or with the cotangent 0."""
    logits, labels, cotangent = _draw(SHAPES["same"], generator)
    labels[0, 3, 4], labels[0, 5, 6] = -1, 2
    cotangent[0, 5, 6] = 0
    _, statistic = ops.upsample_cross_entropy(logits, labels, None, -1)
    right = ops.upsample_cross_entropy_backward(cotangent, logits, labels, statistic, None, -1)
    for value in (torch.nan, torch.inf, -torch.inf, 3e38):
        logits[0, 7:, 3, 4] = logits[0, 7:, 5, 6] = value
        found, statistic = ops.upsample_cross_entropy(logits, labels, None, -1)
        assert found[0, 3, 4] == 0
        grad = ops.upsample_cross_entropy_backward(cotangent, logits, labels, statistic, None, -1)
        assert torch.equal(grad, right)
