"""The CUDA kernels of the memory update, run by the host executor, against PyTorch in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from mcibi_fast.ops.memory_update import reference
from tests.csrc import host_kernels
from tests.csrc.memory_update_host import INTEGERS, LABEL_OPS, MemoryUpdateHost

SHAPES = {  # B, Z, h, w, H, W, K
    "8x": (2, 70, 8, 8, 64, 64, 7),
    "odd": (2, 37, 5, 7, 37, 50, 19),
    "one of all": (1, 1, 1, 1, 1, 1, 1),
    "one pixel": (3, 5, 1, 1, 23, 31, 4),
    "labels smaller": (1, 24, 17, 24, 5, 11, 6),
    "labels the same": (1, 16, 9, 13, 9, 13, 3),
    "wide rows": (1, 8, 3, 131, 7, 530, 5),
    "wide cells": (1, 4, 2, 3, 41, 80, 3),
    "hundreds of classes": (1, 9, 7, 9, 33, 40, 300),
}


@pytest.fixture(scope="module")
def ops(compile_cache: Path) -> MemoryUpdateHost:
    return MemoryUpdateHost(host_kernels.load(compile_cache, "memory_update"))


@pytest.fixture(scope="module")
def race_checked(compile_cache: Path) -> MemoryUpdateHost:
    return MemoryUpdateHost(host_kernels.load(compile_cache, "memory_update", races=True))


def _draw(
    shape: tuple[int, ...], generator: Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Features, and labels of which a part is ignored and the last class (if K > 1) is absent."""
    B, Z, h, w, H, W, K = shape
    features = torch.randn(B, Z, h, w, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, max(K - 1, 1), (B, H, W), generator=generator, dtype=torch.int64)
    ignored = torch.rand(B, H, W, generator=generator) < 0.2
    return features, labels.masked_fill(ignored, -1)


def _error(value: Tensor, exact: Tensor) -> float:
    assert value.isfinite().all()
    return float((value.double() - exact).abs().max())


def _assert_as_good_as_pytorch(value: Tensor, pytorch: Tensor, exact: Tensor) -> None:
    """At most twice the error of PyTorch in the same precision (and a few roundings)."""
    rounding = 4 * torch.finfo(value.dtype).eps * float(exact.abs().max())
    assert _error(value, exact) <= 2 * _error(pytorch, exact) + rounding


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.thinned(together=2)
def test_sums(
    ops: MemoryUpdateHost,
    generator: Generator,
    name: str,
    dtype: torch.dtype,
    align_corners: bool,
) -> None:
    shape = SHAPES[name]
    features, labels = _draw(shape, generator, dtype)
    K = shape[-1]
    exact, counts = reference.class_feature_sums(features.double(), labels, K, align_corners)
    pytorch, _ = reference.class_feature_sums(features, labels, K, align_corners)
    for layout in (torch.contiguous_format, torch.channels_last):
        sums, found = ops.class_feature_sums(
            features.contiguous(memory_format=layout), labels, K, -1, align_corners
        )
        assert torch.equal(found, counts)
        _assert_as_good_as_pytorch(sums, pytorch, exact)


def _regions(labels: Tensor, K: int) -> Tensor:
    """Labels of few regions, one of them ignored, so that most cells have one class."""
    H, W = labels.shape[1:]
    labels = labels.clone()
    labels[:, : H // 2, : W // 3], labels[:, H // 2 :, : W // 3] = K - 1, 0
    labels[:, : H // 2, W // 3 :], labels[:, H // 2 :, W // 3 :] = -1, K // 2
    return labels


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.thinned(together=2)
def test_cells_of_one_class(
    ops: MemoryUpdateHost,
    generator: Generator,
    name: str,
    dtype: torch.dtype,
    align_corners: bool,
) -> None:
    """Their weights come from sums along the axes."""
    features, labels = _draw(SHAPES[name], generator, torch.float64)
    K = SHAPES[name][-1]
    labels = _regions(labels, K)
    exact, counts = reference.class_feature_sums(features, labels, K, align_corners)
    if K < 255:
        labels = labels.masked_fill(labels < 0, 255).to(dtype)
    ignored = 255 if K < 255 else -1
    sums, found = ops.class_feature_sums(features, labels, K, ignored, align_corners)
    assert torch.equal(found, counts)
    assert _error(sums, exact) <= 1e-13 * max(1.0, float(exact.abs().max()))


def test_an_ignored_number_that_looks_like_a_class_in_32_bits(
    ops: MemoryUpdateHost, generator: Generator
) -> None:
    features, labels = _draw(SHAPES["8x"], generator)
    labels = labels.clamp(min=0)
    expected = ops.class_feature_sums(features, labels, 7, 255)
    found = ops.class_feature_sums(features, labels, 7, 2**32 + 3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_groups_of_tiles_give_the_same(
    ops: MemoryUpdateHost, compile_cache: Path, generator: Generator
) -> None:
    """Where the weights of all tiles would take too much memory, tiles are taken in groups."""
    few = "-DMCIBI_MOST_WEIGHT_BYTES=16384"  # 9 tiles of 7 classes in float32, of 33
    grouped = MemoryUpdateHost(host_kernels.load(compile_cache, "memory_update", defines=few))
    Z, h, w, K = 70, 26, 25, 7
    features, labels = _draw((3, Z, h, w, 60, 61, K), generator, torch.float64)
    labels[1] = _regions(labels[1:2], K)[0]
    labels[2] = 1  # the last groups have one class, which is not in the first image
    labels[0][labels[0] == 1] = 2
    for dtype in (torch.float32, torch.float64):
        narrow = features.to(dtype)
        exact, counts = reference.class_feature_sums(narrow.double(), labels, K, False)
        pytorch, _ = reference.class_feature_sums(narrow, labels, K, False)
        for layout in (torch.contiguous_format, torch.channels_last):
            laid_out = narrow.contiguous(memory_format=layout)
            sums, found = grouped.class_feature_sums(laid_out, labels, K, -1)
            assert torch.equal(found, counts)
            _assert_as_good_as_pytorch(sums, pytorch, exact)
    grad = torch.randn(K, Z, generator=generator)
    expected = ops.class_feature_sums_backward(grad, labels, h, w, -1)
    assert torch.equal(grouped.class_feature_sums_backward(grad, labels, h, w, -1), expected)


def test_scratch_memory_does_not_grow_with_the_one_hot_labels(ops: MemoryUpdateHost) -> None:
    size, labels = (8, 512, 128, 128), (8, 1024, 1024)
    weights = 4 * 8 * 128 * 128 * 150  # 79 MB if all tiles had room for all classes
    bytes_of = {b: ops.scratch_bytes((b, *size[1:]), (b, *labels[1:]), 150) for b in (8, 16, 32)}
    partial_sums = 48 * 150 * (4 * 512 + 8)
    assert bytes_of[8] < 36 * 2**20 + partial_sums < weights
    assert max(bytes_of.values()) < 36 * 2**20 + partial_sums


@pytest.mark.parametrize("dtype", INTEGERS)
def test_label_dtypes_and_strides(
    ops: MemoryUpdateHost, generator: Generator, dtype: torch.dtype
) -> None:
    features, labels = _draw(SHAPES["odd"], generator)
    labels = labels.masked_fill(labels < 0, 100)
    expected = ops.class_feature_sums(features, labels, 19, 100)
    labels = labels.to(dtype)
    transposed = labels.transpose(1, 2).contiguous().transpose(1, 2)
    padded = torch.zeros(2, 40, 99, dtype=dtype)
    padded[:, :37, 3::2][..., :48] = labels[..., :48]
    padded = torch.cat([padded[:, :37, 3:99:2], labels[..., 48:]], 2)
    for view in (labels, transposed, padded):
        assert torch.equal(view, labels)
        found = ops.class_feature_sums(features, view, 19, 100)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one, many = labels[:1], labels[:1].expand(2, -1, -1)
    repeated = ops.class_feature_sums(features, many, 19, 100)
    copied = ops.class_feature_sums(features, one.repeat(2, 1, 1), 19, 100)
    assert all(torch.equal(a, b) for a, b in zip(repeated, copied, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feature_strides_and_offsets(
    ops: MemoryUpdateHost, generator: Generator, dtype: torch.dtype
) -> None:
    features, labels = _draw((2, 64, 8, 12, 40, 40, 6), generator, dtype)
    expected, _ = ops.class_feature_sums(features, labels, 6, -1)
    wide = torch.full((2, 70, 10, 13), torch.inf, dtype=dtype)
    views = [
        features.contiguous(memory_format=torch.channels_last),
        features.transpose(2, 3).contiguous().transpose(2, 3),
        features.flip(0).flip(0).permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        wide[:, 3:67, 1:9, :12].copy_(features),
        torch.empty(features.numel() + 3, dtype=dtype)[3:].view(features.shape).copy_(features),
        torch.empty(2, 8, 12, 128, dtype=dtype)[..., ::2].permute(0, 3, 1, 2).copy_(features),
        torch.empty(2, 8, 12, 72, dtype=dtype)[..., :64].permute(0, 3, 1, 2).copy_(features),
    ]
    for view in views:
        assert torch.equal(view, features)
        assert torch.equal(ops.class_feature_sums(view, labels, 6, -1)[0], expected)


def test_offsets_beyond_32_bits(ops: MemoryUpdateHost, generator: Generator) -> None:
    features, labels = _draw((2, 8, 8, 8, 16, 16, 3), generator, torch.bfloat16)
    labels = labels.to(torch.uint8)
    far = (
        2**31 + 64
    )  # elements from the first image to the second; the pages between stay untouched
    try:
        storage = torch.empty(far + 512, dtype=torch.bfloat16)
        label_storage = torch.empty(far + 256, dtype=torch.uint8)
    except RuntimeError:
        pytest.skip("needs 6.5 GB of address space")
    far_features = storage.as_strided(features.shape, (far, 64, 8, 1)).copy_(features)
    far_labels = label_storage.as_strided(labels.shape, (far, 16, 1)).copy_(labels)
    near = ops.class_feature_sums(features, labels, 3)
    for a, b in zip(ops.class_feature_sums(far_features, far_labels, 3), near, strict=True):
        assert torch.equal(a, b)


def test_more_classes_than_a_block_holds(ops: MemoryUpdateHost, generator: Generator) -> None:
    features, labels = _draw((1, 3, 6, 6, 30, 30, 900), generator, torch.float64)
    exact, counts = reference.class_feature_sums(features, labels, 900, False)
    sums, found = ops.class_feature_sums(features, labels, 900, -1)
    assert torch.equal(found, counts)
    assert _error(sums, exact) < 1e-13 * float(exact.abs().max())


def test_bad_labels_are_flagged_and_contribute_nothing(
    ops: MemoryUpdateHost, generator: Generator
) -> None:
    features, labels = _draw(SHAPES["odd"], generator)
    expected = ops.class_feature_sums(features, labels, 19, -1)
    for bad in (19, -2, -(2**40), 2**33):
        broken = torch.where(labels == -1, bad, labels)
        broken[0, 0, 0], labels[0, 0, 0] = -1, -1
        expected = ops.class_feature_sums(features, labels, 19, -1)
        flag = torch.zeros(3, dtype=torch.int64)
        found = ops.class_feature_sums(features, broken, 19, -1, flag=flag)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert flag.tolist() == [
            int((broken == bad).sum()),
            bad,
            LABEL_OPS.index("class_feature_sums"),
        ]
        ops.memory_update(torch.zeros(19, 2), features, broken, ignore_index=-1, flag=flag)
        assert flag.tolist() == [
            2 * int((broken == bad).sum()),
            bad,
            LABEL_OPS.index("class_feature_sums"),
        ]  # the first stays


def test_ignore_index_may_be_a_class(ops: MemoryUpdateHost, generator: Generator) -> None:
    features, labels = _draw(SHAPES["odd"], generator)
    flag = torch.zeros(3, dtype=torch.int64)
    sums, counts = ops.class_feature_sums(features, labels.clamp(min=0), 19, 0, flag=flag)
    masked = labels.clamp(min=0).where(labels > 0, -1)
    expected = ops.class_feature_sums(features, masked, 19, -1)
    assert torch.equal(sums, expected[0])
    assert torch.equal(counts, expected[1])
    assert flag.tolist() == [0, 0, 0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_infinite_features_reach_only_their_classes(
    ops: MemoryUpdateHost, generator: Generator, layout: torch.memory_format
) -> None:
    features, labels = _draw((1, 8, 8, 8, 64, 64, 4), generator)
    labels[:, :, :32], labels[:, :, 32:] = 0, 1
    features[..., 1] = torch.inf
    features[..., 6] = torch.nan
    sums, _ = ops.class_feature_sums(features.contiguous(memory_format=layout), labels, 4)
    assert (sums[0] == torch.inf).all()
    assert sums[1].isnan().all()
    assert (sums[2:] == 0).all()


@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("unbiased", [False, True])
def test_memory_update(
    ops: MemoryUpdateHost,
    generator: Generator,
    dtype: torch.dtype,
    memory_dtype: torch.dtype,
    unbiased: bool,
) -> None:
    features, labels = _draw(SHAPES["odd"], generator, dtype)
    memory = torch.randn(19, 2, generator=generator, dtype=memory_dtype)
    strided = torch.empty(2, 40, dtype=memory_dtype)[:, ::2][:, :19].T.copy_(memory)
    found = ops.memory_update(strided, features, labels, 0.3, unbiased, -1)
    exact_sums, counts = reference.class_feature_sums(features.double(), labels, 19, False)
    sums, _ = reference.class_feature_sums(features, labels, 19, False)
    exact = reference.moving_average(memory.double(), exact_sums, counts, 0.3, unbiased)
    pytorch = reference.moving_average(memory, sums, counts, 0.3, unbiased)
    assert found.dtype == memory_dtype
    _assert_as_good_as_pytorch(found, pytorch, exact)
    assert counts[-1] == 0
    assert torch.equal(found[-1], memory[-1])  # absent


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.float64])
def test_a_row_that_would_not_be_finite_is_kept_and_counted(
    ops: MemoryUpdateHost, generator: Generator, memory_dtype: torch.dtype, value: float
) -> None:
    features, labels = _draw((2, 70, 8, 8, 64, 64, 4), generator)
    labels[:, :, :32], labels[:, :, 32:] = 0, 1
    labels[1, :10] = 2
    memory = torch.rand(4, 2, generator=generator, dtype=memory_dtype)
    usual = ops.memory_update(memory, features, labels)
    features[1, 66, 4:, 6] = value  # of class 1
    kept = torch.zeros(1, dtype=torch.int64)
    for count in (1, 2):
        found = ops.memory_update(memory, features, labels, kept_rows=kept)
        assert kept.tolist() == [count]
        assert torch.equal(found[[1, 3]], memory[[1, 3]])
        assert torch.equal(found[[0, 2]], usual[[0, 2]]) and not torch.equal(found[0], memory[0])
    assert torch.equal(ops.memory_update(memory, features, labels)[1], memory[1])  # not counted


def test_memory_stays_where_all_is_ignored(ops: MemoryUpdateHost, generator: Generator) -> None:
    features, labels = _draw(SHAPES["odd"], generator)
    memory = torch.randn(19, 2, generator=generator)
    labels.fill_(255)
    assert torch.equal(ops.memory_update(memory, features, labels), memory)
    sums, counts = ops.class_feature_sums(features, labels, 19)
    assert not sums.any()
    assert not counts.any()


def test_golden(ops: MemoryUpdateHost, golden: Callable[[str], dict[str, np.ndarray]]) -> None:
    data = {name: torch.from_numpy(array) for name, array in golden("update.npz").items()}

    features, labels = data["feats8"], data["labels"]
    cropped = features[..., :5, :7], labels[..., :37, :50]
    for name, (R, GT), momentum, align_corners in [
        ("memory_ac0", (features, labels), 0.1, False),
        ("memory_ac1", (features, labels), 0.1, True),
        ("memory_ac0_adjust_lr0.004_base0.9_lr0.01", (features, labels), 0.9 / 0.01 * 0.004, False),
        ("memory_nonsquare_5x7_to_37x50", cropped, 0.1, False),
    ]:
        memory = data["memory0"].double()
        for step, recorded in enumerate(data[name].double()):
            memory = ops.memory_update(
                memory, R[step].double(), GT[step], momentum, True, -100, align_corners
            )
            assert _error(memory, recorded) <= 1e-10 * float(recorded.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["odd", "labels smaller", "wide rows"])
def test_backward(
    ops: MemoryUpdateHost, generator: Generator, name: str, dtype: torch.dtype
) -> None:
    B, Z, h, w, _, _, K = SHAPES[name]
    _, labels = _draw(SHAPES[name], generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad_sums = torch.randn(K, Z, generator=generator, dtype=wide)

    def by_autograd(dtype: torch.dtype) -> Tensor:
        features = torch.zeros(B, Z, h, w, dtype=dtype, requires_grad=True)
        sums, _ = reference.class_feature_sums(features, labels, K, True)
        (gradient,) = torch.autograd.grad(sums, features, grad_sums.to(sums.dtype))
        return gradient

    found = ops.class_feature_sums_backward(grad_sums, labels, h, w, -1, True, dtype)
    assert found.dtype == dtype
    _assert_as_good_as_pytorch(found, by_autograd(dtype), by_autograd(torch.float64))


def _all_kernels(ops: MemoryUpdateHost, generator: Generator) -> Callable[[], list[Tensor]]:
    """Inputs that take every path: both layouts, overfull lists, more slots than one stage."""
    first = _draw((1, 66, 5, 8, 20, 29, 24), generator)
    second = _draw((2, 8, 8, 16, 16, 16, 3), generator, torch.bfloat16)
    third = _draw((1, 65, 3, 66, 9, 70, 5), generator)
    channels_last = third[0].contiguous(memory_format=torch.channels_last)
    inputs = [first, second, third, (channels_last, third[1])]
    generator = Generator().manual_seed(1)
    memory = torch.randn(24, 2, generator=generator)

    def run() -> list[Tensor]:
        results = [ops.memory_update(memory, *pair, ignore_index=-1) for pair in inputs]
        grad_sums = torch.ones(24, 3)
        return [*results, ops.class_feature_sums_backward(grad_sums, first[1], 5, 8, -1)]

    return run


def test_same_bits_in_any_order_of_threads(ops: MemoryUpdateHost, generator: Generator) -> None:
    run = _all_kernels(ops, generator)
    expected = run()
    for seed in range(1, 5):
        ops.kernels.set_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    ops.kernels.set_seed(0)


def test_every_barrier_is_needed(ops: MemoryUpdateHost, generator: Generator) -> None:
    run = _all_kernels(ops, generator)
    host_kernels.assert_every_site_is_needed("memory_update", ops.kernels, run, range(8))


@pytest.mark.slow
def test_no_races(race_checked: MemoryUpdateHost, generator: Generator) -> None:
    """Every memory access of every kernel; and without any one barrier there is a race."""
    run = _all_kernels(race_checked, generator)
    host_kernels.assert_every_site_is_needed("memory_update", race_checked.kernels, run, range(1))


@pytest.mark.slow
def test_binding(compile_cache: Path) -> None:
    """Registration, checks and allocation, in a process of its own: it registers the operators."""
    library = host_kernels.build_binding(compile_cache, "memory_update")
    worker = Path(__file__).with_name("memory_update_binding_worker.py")
    command = [sys.executable, str(worker), str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
