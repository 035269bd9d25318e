"""The C++ kernels of the memory update, called directly, against a plain float64 reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mcibi_fast import _build
from mcibi_fast.ops.compiled import cpu_kernel

if _build.load_extensions()["cpu"] is not None:
    pytest.skip(f"needs _cpu: {_build.load_extensions()['cpu']}", allow_module_level=True)

kernels = SimpleNamespace(
    class_feature_sums=cpu_kernel("class_feature_sums").run,
    class_feature_sums_backward=cpu_kernel("class_feature_sums_backward").run,
    memory_update=cpu_kernel("memory_update").run,
)
IGNORE = 255

# (B, Z, h, w, H, W, K): whole and odd ratios, downsampling, single pixels, no resize, tails.
SIZES = [
    (2, 32, 8, 8, 64, 64, 19),
    (1, 17, 5, 7, 37, 50, 6),
    (2, 5, 13, 11, 29, 23, 150),
    (1, 16, 16, 16, 16, 16, 4),
    (3, 3, 9, 12, 4, 5, 3),
    (1, 1, 1, 1, 7, 3, 2),
    (1, 40, 6, 1, 1, 9, 1),
    (1, 33, 64, 20, 512, 161, 21),
]


def make(
    size: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features, and labels in blocks with noise, ignored pixels and absent classes."""
    B, Z, h, w, H, W, K = size
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(B, Z, h, w, generator=generator, dtype=torch.float64) + 0.5
    coarse = torch.randint(0, max(K - 1, 1), (B, 1, 4, 4), generator=generator)
    labels = F.interpolate(coarse.float(), size=(H, W), mode="nearest")[:, 0].long()
    noise = torch.randint(0, max(K - 1, 1), (B, H, W), generator=generator)
    chance = torch.rand(B, H, W, generator=generator)
    labels = torch.where(chance < 0.1, noise, labels)
    return features.to(dtype), torch.where(chance > 0.9, IGNORE, labels)


def reference(
    features: Tensor, labels: Tensor, K: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Upsample, then add up the pixels of each class, in the features' dtype."""
    upsampled = F.interpolate(
        features, size=labels.shape[1:], mode="bilinear", align_corners=align_corners
    )
    pixels = upsampled.movedim(1, -1).flatten(0, -2)
    flat = labels.long().flatten()
    valid = flat != IGNORE
    sums = pixels.new_zeros(K, features.shape[1]).index_add_(0, flat[valid], pixels[valid])
    return sums, torch.bincount(flat[valid], minlength=K)


def worst(ours: Tensor, exact: Tensor) -> float:
    """Largest error over largest value."""
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_sums_and_counts(size: tuple[int, ...], align_corners: bool) -> None:
    features, labels = make(size)
    exact, exact_counts = reference(features, labels, size[-1], align_corners)
    sums, counts = kernels.class_feature_sums(features, labels, size[-1], IGNORE, align_corners)
    assert torch.equal(counts, exact_counts)
    assert worst(sums, exact) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_low_precision_is_as_good_as_torch(size: tuple[int, ...], dtype: torch.dtype) -> None:
    features, labels = make(size, dtype)
    K = size[-1]
    exact, _ = reference(features.double(), labels, K, False)
    torch_sums, _ = reference(features.float(), labels, K, False)
    sums, _ = kernels.class_feature_sums(features, labels, K, IGNORE, False)
    assert sums.dtype == torch.float32
    assert worst(sums, exact) <= max(2 * worst(torch_sums, exact), 2.0**-23)


def layouts(features: Tensor) -> dict[str, Tensor]:
    B, Z, h, w = features.shape
    padded = F.pad(features, (1, 2, 1, 0))[:, :, 1:, 1 : w + 1]
    return {
        "channels_last": features.contiguous(memory_format=torch.channels_last),
        "padded": padded,
        "transposed": features.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": features[:1].expand(B, Z, h, w),
        "every second column": torch.stack([features, features], -1).flatten(-2)[..., ::2],
        "flipped batch stride": torch.stack([features, features], 1)[:, 1],
        "unaligned": torch.cat([features.flatten()[:1], features.flatten()])[1:].view_as(features),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
def test_strides_of_features(layout: str, dtype: torch.dtype) -> None:
    for size in (SIZES[1], SIZES[2]):
        features, labels = make(size, dtype)
        strided = layouts(features)[layout]
        plain, _ = kernels.class_feature_sums(strided.contiguous(), labels, size[-1], IGNORE, False)
        sums, _ = kernels.class_feature_sums(strided, labels, size[-1], IGNORE, False)
        assert torch.equal(sums, plain)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_label_dtypes_and_strides(dtype: torch.dtype) -> None:
    features, labels = make(SIZES[1])
    ignore = IGNORE if dtype != torch.int8 else -7
    labels = labels.masked_fill(labels == IGNORE, ignore)
    plain = kernels.class_feature_sums(features, labels, 6, ignore, False)
    typed = labels.to(dtype)
    spread = torch.stack([typed, typed + 1], -1)[..., 0]
    turned = typed.transpose(1, 2).contiguous().transpose(1, 2)
    for variant in (typed, spread, turned):
        for ours, expected in zip(
            kernels.class_feature_sums(features, variant, 6, ignore, False), plain, strict=True
        ):
            assert torch.equal(ours, expected)


def test_ignore_index_inside_the_classes() -> None:
    features, labels = make(SIZES[0])
    sums, counts = kernels.class_feature_sums(
        features, labels.masked_fill(labels == IGNORE, 3), 19, 3, False
    )
    exact, exact_counts = reference(features, labels.masked_fill(labels == 3, IGNORE), 19, False)
    assert worst(sums, exact) < 1e-14
    assert torch.equal(counts, exact_counts)
    assert counts[3] == 0


def test_everything_ignored() -> None:
    features, labels = make(SIZES[0])
    sums, counts = kernels.class_feature_sums(
        features, torch.full_like(labels, IGNORE), 19, IGNORE, False
    )
    assert not sums.any()
    assert not counts.any()


@pytest.mark.parametrize("value", [200, -1, 19, 2**32 + 3])
def test_a_bad_label_is_named(value: int) -> None:
    features, labels = make(SIZES[0])
    labels[1, 5, 9] = labels[1, 40, 2] = value
    message = (
        rf"labels: value {value} at \(b=1, y=5, x=9\) is outside \[0, 19\) and is not "
        r"ignore_index \(255\)"
    )
    memory = torch.zeros(19, 2)
    grad = torch.zeros(19, 32)
    with pytest.raises(ValueError, match=message):
        kernels.class_feature_sums(features, labels, 19, IGNORE, False)
    with pytest.raises(ValueError, match=message):
        kernels.memory_update(memory, features, labels, 0.1, False, IGNORE, False)
    with pytest.raises(ValueError, match=message):
        kernels.class_feature_sums_backward(grad, labels, 8, 8, IGNORE, False, torch.float32)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_backward_is_the_adjoint(size: tuple[int, ...], align_corners: bool) -> None:
    features, labels = make(size)
    generator = torch.Generator().manual_seed(1)
    K, Z = size[-1], size[1]
    grad_sums = torch.randn(K, Z, generator=generator, dtype=torch.float64)
    leaf = features.clone().requires_grad_()
    sums, _ = reference(leaf, labels, K, align_corners)
    (exact,) = torch.autograd.grad(sums, leaf, grad_sums)
    grad = kernels.class_feature_sums_backward(
        grad_sums, labels, *size[2:4], IGNORE, align_corners, torch.float64
    )
    assert grad.shape == features.shape
    assert worst(grad, exact) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_in_low_precision_rounds_once(dtype: torch.dtype) -> None:
    size = SIZES[0]  # a ratio of eight: the weights are exact in float32
    _, labels = make(size)
    generator = torch.Generator().manual_seed(1)
    grad_sums = torch.randn(19, 32, generator=generator)
    exact = kernels.class_feature_sums_backward(
        grad_sums.double().t().contiguous().t(), labels, 8, 8, IGNORE, False, torch.float64
    )
    grad = kernels.class_feature_sums_backward(grad_sums, labels, 8, 8, IGNORE, False, dtype)
    assert torch.equal(grad, exact.float().to(dtype))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.float64])
def test_memory_update(memory_dtype: torch.dtype, unbiased: bool) -> None:
    size = SIZES[7]
    features, labels = make(size)
    K = size[-1]
    generator = torch.Generator().manual_seed(2)
    memory = torch.rand(2, K, generator=generator, dtype=memory_dtype).t()  # column by column
    before = memory.clone()
    updated = kernels.memory_update(memory, features, labels, 0.3, unbiased, IGNORE, False)
    sums, counts = reference(features, labels, K, False)
    mean = sums / counts[:, None]
    new = torch.stack([mean.mean(1), mean.std(1, correction=int(unbiased))], 1)
    exact = torch.where((counts > 0)[:, None], 0.7 * memory.double() + 0.3 * new, memory.double())
    assert updated.dtype == memory_dtype
    assert worst(updated, exact) < (1e-13 if memory_dtype == torch.float64 else 2.0**-23)
    assert torch.equal(memory, before)
    absent = counts == 0
    assert absent.any()
    assert torch.equal(updated[absent], memory[absent])


def test_golden_update(golden) -> None:  # type: ignore[no-untyped-def]
    data = golden("update.npz")
    for align_corners in (0, 1):
        memory = torch.from_numpy(data["memory0"]).double()
        for step in range(2):
            features = torch.from_numpy(data["feats8"][step]).double()
            labels = torch.from_numpy(data["labels"][step])
            memory = kernels.memory_update(
                memory, features, labels, 0.1, True, -100, bool(align_corners)
            )
            exact = torch.from_numpy(data[f"memory_ac{align_corners}"][step]).double()
            assert worst(memory, exact) < 1e-10


def test_the_same_bits_for_any_number_of_threads() -> None:
    size = (2, 70, 24, 24, 190, 190, 21)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                features, labels = make(size, dtype)
                sums, counts = kernels.class_feature_sums(features, labels, 21, IGNORE, False)
                grad = kernels.class_feature_sums_backward(
                    sums, labels, 24, 24, IGNORE, False, dtype
                )
                memory = torch.zeros(21, 2)
                memory = kernels.memory_update(memory, features, labels, 0.1, False, IGNORE, False)
                results.append((number, [sums, counts, grad, memory]))
    finally:
        torch.set_num_threads(threads)
    for i, (_, tensors) in enumerate(results):
        for ours, first in zip(tensors, results[i % 3][1], strict=True):
            assert torch.equal(ours, first)
