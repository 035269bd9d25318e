"""The CUDA kernels that compute the reduced loss and its gradient in one pass, run by the host
executor, against PyTorch in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from tests.csrc import host_kernels
from tests.csrc.memory_update_host import INTEGERS, LABEL_OPS
from tests.csrc.test_upsample_cross_entropy_cuda_host import OP, _assert_as_good_as_pytorch, _draw
from tests.csrc.upsample_cross_entropy_host import UpsampleCrossEntropyHost

SHAPES = {  # B, K, h, w, H, W
    "8x": (2, 7, 4, 9, 32, 72),
    "4x": (1, 19, 5, 6, 20, 24),
    "odd": (1, 19, 5, 7, 37, 51),
    "one class": (2, 1, 3, 5, 23, 31),
    "two classes": (1, 2, 7, 11, 29, 53),
    "one source pixel": (2, 3, 1, 1, 21, 26),
    "barely larger": (1, 5, 12, 13, 13, 15),
    "wide cells": (1, 3, 3, 2, 23, 61),
    "tall cells": (1, 3, 2, 3, 61, 70),
    "many tiles": (1, 21, 11, 19, 23, 41),
    "16 lanes": (1, 60, 3, 5, 17, 23),
    "150": (1, 150, 3, 7, 10, 71),
    "151": (1, 151, 2, 3, 17, 13),
    "192": (1, 192, 3, 4, 7, 9),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def ops(compile_cache: Path) -> UpsampleCrossEntropyHost:
    return UpsampleCrossEntropyHost(host_kernels.load(compile_cache, OP))


def _one_pass(
    ops: UpsampleCrossEntropyHost, logits: Tensor, labels: Tensor, *options: object
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, in float32."""
    loss, sums = ops.upsample_cross_entropy_reduced(logits, labels, *options)
    one, wide_logits = torch.ones(()), logits.float()
    grad = ops.upsample_cross_entropy_gather(one, sums, wide_logits, labels)
    return loss, grad


def _pytorch(
    logits: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    align_corners: bool = False,
    mean: bool = True,
) -> tuple[Tensor, Tensor]:
    """The reduced loss and its gradient, computed in dtype; -1 is ignored."""
    logits = logits.to(dtype).requires_grad_()
    upsampled = F.interpolate(
        logits, labels.shape[-2:], mode="bilinear", align_corners=align_corners
    )
    weight = None if weight is None else weight.to(dtype)
    total = F.cross_entropy(
        *(upsampled, labels, weight), ignore_index=-1, label_smoothing=smoothing, reduction="sum"
    )
    if mean:
        valid = labels[labels >= 0]
        divisor = torch.tensor(float(valid.numel())) if weight is None else weight[valid].sum()
        total = total / (divisor if valid.numel() else 1)
    (grad,) = torch.autograd.grad(total, logits)
    return total.detach(), grad


def _check(
    ops: UpsampleCrossEntropyHost,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    align_corners: bool = False,
    mean: bool = True,
) -> None:
    options = (weight, smoothing, align_corners, mean)
    exact = _pytorch(logits, labels, torch.float64, *options)
    pytorch = _pytorch(logits, labels, torch.float32, *options)
    loss, grad = _one_pass(ops, logits, labels, weight, -1, *options[1:])
    # One number, which PyTorch may round to by luck.
    torch.testing.assert_close(loss.double(), exact[0], rtol=2e-7, atol=0)
    largest = 1.0 if weight is None else float(weight.max())
    if mean:
        largest /= max(int((labels >= 0).sum()), 1)
    _assert_as_good_as_pytorch(grad, pytorch[1], exact[1], largest)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.thinned(together=2)
def test_loss_and_gradient(
    ops: UpsampleCrossEntropyHost,
    generator: Generator,
    name: str,
    dtype: torch.dtype,
    align_corners: bool,
) -> None:
    logits, labels, _ = _draw(SHAPES[name], generator, dtype)
    if align_corners:
        logits = logits.contiguous(memory_format=torch.channels_last)
    _check(ops, logits, labels, align_corners=align_corners, mean=dtype != torch.float16)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("name", ["odd", "tall cells", "16 lanes", "151"])
@pytest.mark.thinned(together=2)
def test_weight_and_label_smoothing(
    ops: UpsampleCrossEntropyHost,
    generator: Generator,
    name: str,
    mean: bool,
    weighted: bool,
    smoothing: float,
) -> None:
    logits, labels, _ = _draw(SHAPES[name], generator)
    weight = torch.rand(SHAPES[name][1], generator=generator) if weighted else None
    _check(ops, logits, labels, weight, smoothing, mean=mean)


@pytest.mark.parametrize("factor", [0.1, 1.0, 100.0])
def test_labels_in_regions(
    ops: UpsampleCrossEntropyHost, generator: Generator, factor: float
) -> None:
    """Columns with one label, with several, and with none that counts; and classes that lead by
    far, so that single pixels are done again with their own largest logit."""
    logits, labels, _ = _draw((2, 150, 4, 9, 32, 72), generator)
    labels = labels[:, ::16, ::24].clamp(min=0)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(24, 2)
    labels[1, 5, :30] = labels[0, :8, :16] = -1
    _check(ops, logits * factor, labels)


@pytest.mark.parametrize("factor", [1e-3, 25.0, 250.0, 2.5e8, 1e30])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["8x", "odd", "150"])
@pytest.mark.thinned(together=2)
def test_logits_of_any_scale(
    ops: UpsampleCrossEntropyHost, generator: Generator, name: str, smoothing: float, factor: float
) -> None:
    logits, labels, _ = _draw(SHAPES[name], generator)
    _check(ops, (logits * factor).float(), labels, None, smoothing)


def test_large_logits(ops: UpsampleCrossEntropyHost, generator: Generator) -> None:
    logits, labels, _ = _draw(SHAPES["8x"], generator)
    _check(ops, logits * 500 + 3000, labels)
    _check(ops, logits + 3000, labels, None, 0.1)


def test_confident_predictions_keep_their_small_gradients(
    ops: UpsampleCrossEntropyHost, generator: Generator
) -> None:
    """The label has nearly all of the probability: 1 must not be rounded away from it."""
    logits, labels, _ = _draw((1, 19, 4, 5, 32, 40), generator)
    labels.fill_(3)
    logits[:, 3] += 30
    exact = _pytorch(logits, labels, torch.float64)
    pytorch = _pytorch(logits, labels, torch.float32)
    loss, grad = _one_pass(ops, logits, labels, None, -1)
    assert abs(loss - exact[0]) <= 1e-7
    error = (grad.double() - exact[1]).abs().max()
    assert error <= 2 * (pytorch[1].double() - exact[1]).abs().max()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_label_dtypes_and_strides(
    ops: UpsampleCrossEntropyHost, generator: Generator, dtype: torch.dtype
) -> None:
    logits, labels, _ = _draw(SHAPES["8x"], generator)
    labels = labels.masked_fill(labels < 0, 100)
    expected = _one_pass(ops, logits, labels, None, 100)
    labels = labels.to(dtype)
    shifted = torch.empty(2, 33, 200, dtype=dtype)[:, 1:, 5:149:2].copy_(labels)
    for view in (labels, shifted, labels.transpose(0, 2).contiguous().transpose(0, 2)):
        found = _one_pass(ops, logits, view, None, 100)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logit_strides_and_offsets(
    ops: UpsampleCrossEntropyHost, generator: Generator, dtype: torch.dtype
) -> None:
    logits, labels, _ = _draw(SHAPES["8x"], generator, dtype)
    B, K, h, w = logits.shape
    views = [
        logits.contiguous(memory_format=torch.channels_last),
        logits.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        torch.full((B, K + 3, h + 2, w + 5), torch.inf, dtype=dtype)[:, 1:-2, 2:, 4:-1],
        torch.empty(logits.numel() + 3, dtype=dtype)[3:].view(logits.shape),
    ]
    expected = _one_pass(ops, logits, labels, None, -1)
    for view in views:
        found = _one_pass(ops, view.copy_(logits), labels, None, -1)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bad_labels_are_flagged_once_and_contribute_nothing(
    ops: UpsampleCrossEntropyHost, generator: Generator
) -> None:
    logits, labels, _ = _draw(SHAPES["150"], generator)
    weight = torch.rand(150, generator=generator)
    expected = _one_pass(ops, logits, labels, weight, -1, 0.2, True)
    for bad in (150, -2, -(2**40), 2**33):
        broken = labels.masked_fill(labels < 0, bad)
        flag = torch.zeros(3, dtype=torch.int64)
        found = _one_pass(ops, logits, broken, weight, -1, 0.2, True, True, flag)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert flag.tolist() == [int((broken == bad).sum()), bad, LABEL_OPS.index(OP)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_but_ignored_pixels(
    ops: UpsampleCrossEntropyHost, generator: Generator, smoothing: float
) -> None:
    logits, labels, _ = _draw(SHAPES["odd"], generator)
    labels.fill_(3)  # a class, and ignored
    flag = torch.zeros(3, dtype=torch.int64)
    for weight in (None, torch.zeros(19)):
        loss, grad = _one_pass(ops, logits * 100, labels, weight, 3, smoothing, False, True, flag)
        assert loss == 0 and not grad.any() and not flag.any()


def test_weights_that_are_all_zero_give_nan_as_a_mean_and_zero_as_a_sum(
    ops: UpsampleCrossEntropyHost, generator: Generator
) -> None:
    logits, labels, _ = _draw(SHAPES["odd"], generator)
    labels[:, 12:] = -1
    options = (torch.zeros(19), -1, 0.1, False)
    loss, grad = _one_pass(ops, logits, labels, *options, True)
    assert loss.isnan() and grad[:, :, 0].isnan().any() and not grad[:, :, -1].any()
    loss, grad = _one_pass(ops, logits, labels, *options, False)
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_pixels_may_have_any_logits(
    ops: UpsampleCrossEntropyHost, generator: Generator, smoothing: float, value: float
) -> None:
    """Also beside pixels of the same column that count, in the part of a cell that they read."""
    logits, labels, _ = _draw((2, 7, 4, 9, 32, 72), generator)
    labels = labels.clamp(min=0)
    # All pixels between the two inputs and their neighbours, and the rest of some columns.
    labels[0, 4:28, 28:44] = -1
    labels[1, 20:, 60:] = -1
    options = (None, -1, smoothing)
    loss, right = _one_pass(ops, logits, labels, *options)
    logits[0, 3, 2, 4] = logits[1, :, 3, 8] = value
    found, grad = _one_pass(ops, logits, labels, *options)
    assert torch.equal(found, loss) and torch.equal(grad, right)


def test_gradients_of_any_logits_are_nan_where_pytorchs_are(
    ops: UpsampleCrossEntropyHost, generator: Generator
) -> None:
    """Infinities, NaN, and nothing but the lowest numbers."""
    shape = (1, 19, 4, 6, 32, 48)  # of exact weights, so that 0 times infinity is PyTorch's
    logits, labels, _ = _draw(shape, generator, torch.float64)
    labels = labels.clamp(min=0)
    some = torch.rand(logits.shape, generator=generator) < 0.02
    cases = [logits.masked_fill(some, v) for v in (-torch.inf, torch.inf, torch.nan)]
    cases += [torch.full_like(logits, -torch.inf)]
    for case in cases:
        loss, right = _pytorch(case, labels, torch.float64)
        found, grad = _one_pass(ops, case.float(), labels, None, -1)
        assert found.isnan() == loss.isnan()
        assert torch.equal(grad.isnan(), right.isnan())
        assert not grad.isinf().any()
    loss, grad = _one_pass(ops, torch.full(shape[:4], -3e38), labels, None, -1)
    torch.testing.assert_close(loss, torch.tensor(19.0).log())
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_multiplies(
    ops: UpsampleCrossEntropyHost, generator: Generator, dtype: torch.dtype
) -> None:
    """By a factor beyond float16's range too; by 0 to 0, whatever the gradient is."""
    logits, labels, _ = _draw(SHAPES["odd"], generator, dtype)
    labels[:, :, 20:] = -1
    _, sums = ops.upsample_cross_entropy_reduced(logits, labels, None, -1)
    backward = ops.upsample_cross_entropy_gather
    grad = backward(torch.ones(()), sums, logits.float(), labels)
    for factor in (1.0, -3.0, 65536.0):
        found = backward(torch.tensor(factor), sums, logits, labels)
        assert found.dtype == dtype and torch.equal(found, (grad * factor).to(dtype))
    logits[:, 0, 0, 0] = torch.nan
    _, sums = ops.upsample_cross_entropy_reduced(logits, labels, None, -1)
    assert not backward(torch.zeros(()), sums, logits, labels).any()
    infinite = backward(torch.tensor(torch.inf), sums, logits, labels)
    assert not infinite[..., -2:].any()  # ignored pixels alone read these


def test_what_is_left_to_two_kernels(ops: UpsampleCrossEntropyHost) -> None:
    """Many classes, float64, and maps that are not enlarged."""
    for shape, dtype, size in [
        ((1, 193, 2, 2), torch.float32, (4, 4)),
        ((1, 3, 2, 2), torch.float64, (4, 4)),
        ((1, 3, 4, 2), torch.float32, (4, 4)),
        ((1, 3, 2, 5), torch.float32, (4, 4)),
    ]:
        logits, labels = torch.zeros(shape, dtype=dtype), torch.zeros(1, *size, dtype=torch.int64)
        assert ops.bytes_of("reduced_sums", logits, labels) == 0
        with pytest.raises(RuntimeError):
            ops.upsample_cross_entropy_reduced(logits, labels)


def test_the_saved_sums_are_a_few_gradients(ops: UpsampleCrossEntropyHost) -> None:
    for K, size, scale, most in [(19, 64, 8, 1.3), (150, 64, 8, 1.45), (150, 128, 4, 1.45)]:
        logits = torch.empty(1, K, size, size).expand(8, -1, -1, -1)
        labels = torch.empty(1, 1, 1).expand(8, scale * size, scale * size).to(torch.uint8)
        assert ops.bytes_of("reduced_sums", logits, labels) <= most * 4 * logits.numel()
