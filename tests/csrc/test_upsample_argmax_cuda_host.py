"""The CUDA kernels of upsample_argmax and upsample_confusion, run by the host executor, against
PyTorch in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from tests.csrc import host_kernels
from tests.csrc.memory_update_host import INTEGERS, LABEL_OPS
from tests.csrc.upsample_argmax_host import UpsampleArgmaxHost

OP = "upsample_argmax"
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
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def ops(compile_cache: Path) -> UpsampleArgmaxHost:
    return UpsampleArgmaxHost(host_kernels.load(compile_cache, OP))


@pytest.fixture(scope="module")
def race_checked(compile_cache: Path) -> UpsampleArgmaxHost:
    return UpsampleArgmaxHost(host_kernels.load(compile_cache, OP, races=True))


@pytest.fixture
def little_shared_memory(ops: UpsampleArgmaxHost) -> Iterator[None]:
    ops.set_shared_memory(16)
    yield
    ops.set_shared_memory(163)


def _draw(
    shape: tuple[int, ...], generator: Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Logits of which neighbours are alike, and labels of which a part is ignored (-1)."""
    B, K, h, w, H, W = shape
    logits = torch.randn(B, K, h, w, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K, (B, H, W), generator=generator, dtype=torch.int64)
    ignored = torch.rand(B, H, W, generator=generator) < 0.2
    return logits.to(dtype), labels.masked_fill(ignored, -1)


def _upsample(logits: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    return F.interpolate(logits.double(), size, mode="bilinear", align_corners=align_corners)


def _confusion(prediction: Tensor, labels: Tensor, K: int) -> Tensor:
    valid = labels >= 0
    pairs = labels[valid] * K + prediction[valid]
    return torch.bincount(pairs, minlength=K * K).view(K, K)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.thinned(together=2)
def test_argmax_and_confusion(
    ops: UpsampleArgmaxHost,
    generator: Generator,
    name: str,
    dtype: torch.dtype,
    align_corners: bool,
) -> None:
    """The prediction's logit is the largest, but for rounding, and the counts are its own."""
    shape = SHAPES[name]
    logits, labels = _draw(shape, generator, dtype)
    size = (shape[-2], shape[-1])
    exact = _upsample(logits, size, align_corners)
    rounding = 1e-12 if dtype == torch.float64 else 2e-5  # of float32 positions, 2^-17 of a cell
    for layout in (torch.contiguous_format, torch.channels_last):
        given = logits.contiguous(memory_format=layout)
        prediction = ops.upsample_argmax(given, *size, align_corners)
        assert prediction.ge(0).all()
        assert prediction.lt(shape[1]).all()
        chosen = exact.gather(1, prediction[:, None])[:, 0]
        assert (exact.amax(1) - chosen).max() <= rounding * exact.abs().max()
        assert (prediction != exact.argmax(1)).sum() <= 1e-3 * prediction.numel()
        confusion = ops.upsample_confusion(given, labels, -1, align_corners)
        assert torch.equal(confusion, _confusion(prediction, labels, shape[1]))


@pytest.mark.parametrize("name", ["8x", "odd", "smaller", "tall cells", "same"])
def test_ties_go_to_the_first_class(
    ops: UpsampleArgmaxHost, generator: Generator, name: str
) -> None:
    B, K, h, w, H, W = SHAPES[name]
    logits = torch.randn(B, 1, h, w, generator=generator).expand(-1, K, -1, -1)
    assert not ops.upsample_argmax(logits, H, W).any()
    twice = torch.randn(B, K, h, w, generator=generator).repeat(1, 2, 1, 1)
    assert ops.upsample_argmax(twice, H, W).max() < K


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["8x", "odd", "smaller", "tall cells"])
def test_nan_and_infinity_as_in_torch_argmax(
    ops: UpsampleArgmaxHost, generator: Generator, name: str, dtype: torch.dtype
) -> None:
    logits, _ = _draw(SHAPES[name], generator, dtype)
    draws = torch.rand(logits.shape, generator=generator)
    logits[draws < 0.02] = torch.nan
    logits[draws > 0.98] = torch.inf
    logits[(draws > 0.47) & (draws < 0.53)] = -torch.inf
    size = SHAPES[name][-2:]
    upsampled = F.interpolate(logits, size, mode="bilinear")
    unclear = upsampled.isnan().any(1) | (upsampled.isinf().all(1))
    assert unclear.any()
    found, right = ops.upsample_argmax(logits, *size), upsampled.argmax(1)
    assert torch.equal(found[unclear], right[unclear])
    assert (found != right).sum() <= 1e-3 * found.numel()


def test_no_logit_but_minus_infinity(ops: UpsampleArgmaxHost) -> None:
    logits = torch.full((1, 3, 4, 5), -torch.inf)
    assert not ops.upsample_argmax(logits, 4, 5).any()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_label_dtypes_and_strides(
    ops: UpsampleArgmaxHost, generator: Generator, dtype: torch.dtype
) -> None:
    logits, labels = _draw(SHAPES["8x"], generator)
    labels = labels.masked_fill(labels < 0, 100)
    expected = ops.upsample_confusion(logits, labels, 100)
    labels = labels.to(dtype)
    shifted = torch.empty(2, 33, 200, dtype=dtype)[:, 1:, 5:149:2].copy_(labels)
    transposed = labels.transpose(0, 2).contiguous().transpose(0, 2)
    for view in (labels, shifted, transposed):
        assert torch.equal(ops.upsample_confusion(logits, view, 100), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["8x", "smaller"])
def test_logit_strides_and_offsets(
    ops: UpsampleArgmaxHost, generator: Generator, name: str, dtype: torch.dtype
) -> None:
    logits, _ = _draw(SHAPES[name], generator, dtype)
    B, K, h, w = logits.shape
    views = [
        logits.contiguous(memory_format=torch.channels_last),
        logits.transpose(2, 3).contiguous().transpose(2, 3),
        torch.full((B, K + 3, h + 2, w + 5), torch.inf, dtype=dtype)[:, 1:-2, 2:, 4:-1],
        torch.empty(logits.numel() + 3, dtype=dtype)[3:].view(logits.shape),
        torch.empty(B, h, w, 2 * K, dtype=dtype)[..., ::2].permute(0, 3, 1, 2),
    ]
    size = SHAPES[name][-2:]
    expected = ops.upsample_argmax(logits, *size)
    for view in views:
        assert torch.equal(ops.upsample_argmax(view.copy_(logits), *size), expected)


def test_bad_labels_are_flagged_and_do_not_count(
    ops: UpsampleArgmaxHost, generator: Generator
) -> None:
    logits, labels = _draw(SHAPES["odd"], generator)
    expected = ops.upsample_confusion(logits, labels, -1)
    for bad in (19, -2, -(2**40), 2**33):
        broken = labels.masked_fill(labels < 0, bad)
        flag = torch.zeros(3, dtype=torch.int64)
        assert torch.equal(ops.upsample_confusion(logits, broken, -1, flag=flag), expected)
        assert flag.tolist() == [
            int((broken == bad).sum()),
            bad,
            LABEL_OPS.index("upsample_confusion"),
        ]
    flag.zero_()
    ignored = ops.upsample_confusion(logits, labels.clamp(min=0), 0, flag=flag)
    assert torch.equal(ignored[1:], expected[1:])
    assert not ignored[0].any()
    assert not flag.any()


@pytest.mark.usefixtures("little_shared_memory")
@pytest.mark.parametrize("name", ["odd", "smaller"])
def test_more_classes_than_a_block_counts(
    ops: UpsampleArgmaxHost, generator: Generator, name: str
) -> None:
    shape = (1, 70, *SHAPES[name][2:])
    logits, labels = _draw(shape, generator)
    prediction = ops.upsample_argmax(logits, *shape[-2:])
    confusion = ops.upsample_confusion(logits, labels, -1)
    assert torch.equal(confusion, _confusion(prediction, labels, 70))


def test_several_tiles_to_a_block(ops: UpsampleArgmaxHost, generator: Generator) -> None:
    shape = (2, 2, 16, 64, 64, 256)
    logits, labels = _draw(shape, generator)
    prediction = ops.upsample_argmax(logits, *shape[-2:])
    confusion = ops.upsample_confusion(logits, labels, -1)
    assert torch.equal(confusion, _confusion(prediction, labels, 2))


def _all_kernels(ops: UpsampleArgmaxHost, generator: Generator) -> Callable[[], list[Tensor]]:
    """Inputs that take every path: several patches, several tiles to a block, no patch."""
    shapes = [(1, 130, 3, 4, 7, 9), (1, 3, 9, 34, 19, 203), (1, 5, 6, 4, 5, 70)]
    inputs = [_draw(shape, generator) for shape in shapes]

    def run() -> list[Tensor]:
        results = []
        for logits, labels in inputs:
            results.append(ops.upsample_argmax(logits, *labels.shape[-2:]))
            results.append(ops.upsample_confusion(logits, labels, -1))
        return results

    return run


def test_same_result_in_any_order_of_threads(ops: UpsampleArgmaxHost, generator: Generator) -> None:
    run = _all_kernels(ops, generator)
    expected = run()
    for seed in range(1, 5):
        ops.kernels.set_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    ops.kernels.set_seed(0)


def test_every_barrier_is_needed(ops: UpsampleArgmaxHost, generator: Generator) -> None:
    run = _all_kernels(ops, generator)
    host_kernels.assert_every_site_is_needed(OP, ops.kernels, run, range(8))


@pytest.mark.slow
def test_no_races(race_checked: UpsampleArgmaxHost, generator: Generator) -> None:
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
