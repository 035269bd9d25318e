"""Scales, flips, windows and stages against the plain way, and the memory they take."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mcibi_fast import models
from mcibi_fast.inference import labels as module
from mcibi_fast.inference.labels import predict_labels
from mcibi_fast.inference.views import interpolation_taps
from mcibi_fast.models import SegmentationHead
from mcibi_fast.recipes import InferenceConfig

PAIRS = ((1, 2), (3, 5))


class Output(NamedTuple):
    logits: Tensor


class Network(nn.Module):
    """A convolution with stride 4 that knows left from right; notes the sizes it was given."""

    def __init__(self, num_classes: int = 6, *, align_corners: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(num_classes, 3, 5, 5, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight / 3)
        self.head = SegmentationHead()
        self.head.align_corners = align_corners
        self.needs_labels = False
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Output:
        self.seen.append(tuple(images.shape[2:]))
        return Output(F.conv2d(images, self.weight.to(images.dtype), stride=4, padding=2))


def pictures(height: int, width: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


def naive(model: Network, images: Tensor, size: tuple[int, int], config: InferenceConfig) -> Tensor:
    """As toolboxes write it: everything at full resolution."""
    align = model.head.align_corners
    total = torch.zeros(())
    for scale in config.scales:
        sides = [int(side * scale + 0.5) for side in images.shape[2:]]
        scaled = F.interpolate(images, sides, mode="bilinear")
        for flip in (False, True) if config.flip else (False,):
            logits = naive_view(model, scaled.flip(3) if flip else scaled, config, align)
            if flip:
                swapped = logits.clone()
                for a, b in PAIRS:
                    swapped[:, a], swapped[:, b] = logits[:, b], logits[:, a]
                logits = swapped.flip(3)
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=align)
            total = total + (logits.softmax(1) if config.softmax == "labels" else logits)
    return total.argmax(1)


def naive_view(model: Network, images: Tensor, config: InferenceConfig, align: bool) -> Tensor:
    early = config.softmax == "stride"
    forward = lambda x: model(x).logits.softmax(1) if early else model(x).logits  # noqa: E731
    if config.window is None:
        return forward(images)
    height, width = images.shape[2:]
    (h, w), (down, right) = config.window, config.window_stride
    padded = F.pad(images, (0, max(w - width, 0), 0, max(h - height, 0)))
    H, W = padded.shape[2:]
    total, count = torch.zeros(len(images), 6, H, W, dtype=images.dtype), torch.zeros(H, W)
    for i in range(max(H - h + down - 1, 0) // down + 1):
        for j in range(max(W - w + right - 1, 0) // right + 1):
            bottom, end = min(i * down + h, H), min(j * right + w, W)
            part = (..., slice(bottom - h, bottom), slice(end - w, end))
            logits = forward(padded[part])
            total[part] += F.interpolate(logits, (h, w), mode="bilinear", align_corners=align)
            count[part] += 1
    assert count.min() > 0
    return (total / count)[:, :, :height, :width]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("n, m", [(37, 5), (5, 37), (8, 8), (1, 3), (3, 1), (1, 1), (64, 9)])
def test_taps_are_those_of_interpolate(n: int, m: int, align_corners: bool) -> None:
    values = torch.randn(2, 3, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    taps = interpolation_taps(n, m, align_corners, values)
    expected = F.interpolate(values, n, mode="linear", align_corners=align_corners)
    torch.testing.assert_close((values[..., taps.source] * taps.weight).sum(-1), expected)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        InferenceConfig((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=True),
        InferenceConfig((0.75, 1.0, 1.25)),
        InferenceConfig((1.0,), flip=True),
        InferenceConfig((0.7,)),
        InferenceConfig(window=(16, 24)),
        InferenceConfig(window=(16, 20), stride=(7, 20), flip=True),
        InferenceConfig((0.5, 1.3), window=(29, 18), stride=(10, 13), flip=True),
        InferenceConfig((0.5, 1.0), window=(64, 20), flip=True),  # padded in one direction
        InferenceConfig(window=(80, 90), flip=True),  # and in both
        InferenceConfig((0.5, 1.3), window=(29, 18), flip=True, softmax="stride"),
        InferenceConfig((0.75, 1.5), softmax="stride"),
        InferenceConfig(softmax="stride"),
        InferenceConfig((0.5, 0.75, 1.3), flip=True, softmax="none"),
        InferenceConfig((0.5, 1.3), window=(29, 18), flip=True, softmax="none"),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(37, 53), (61, 47), (9, 10)], ids=str)
@pytest.mark.thinned
def test_equals_the_plain_way(
    config: InferenceConfig, size: tuple[int, int], align_corners: bool
) -> None:
    model, images = Network(align_corners=align_corners), pictures(37, 53)
    with torch.no_grad():
        labels = predict_labels(model, images, size, config, flip_pairs=PAIRS)
        expected = naive(model, images, size, config)
    assert labels.dtype == torch.int64 and labels.shape == (2, *size)
    assert torch.equal(labels, expected)
    assert len(expected.unique()) > 3


def test_windows_end_with_the_image_and_small_images_are_padded() -> None:
    model = Network()
    predict_labels(model, pictures(37, 53), (37, 53), InferenceConfig(window=(16, 24)))
    assert set(model.seen) == {(16, 24)} and len(model.seen) == 4 * 3  # by 10 and 16
    model.seen.clear()
    predict_labels(model, pictures(37, 53), (37, 53), InferenceConfig(window=(40, 40)))
    assert model.seen == [(40, 40)] * 2


def test_flip_pairs_change_places() -> None:
    model, images = Network(), pictures(24, 24)
    config = InferenceConfig(flip=True)
    swapped = predict_labels(model, images, (24, 24), config, flip_pairs=PAIRS)
    assert not torch.equal(swapped, predict_labels(model, images, (24, 24), config))
    with pytest.raises(ValueError, match="the model has 6 classes"):
        predict_labels(model, images, (24, 24), config, flip_pairs=((1, 6),))


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize(
    "config",
    [
        InferenceConfig((0.5, 1.0, 1.5), flip=True),
        InferenceConfig(window=(40, 40)),
        InferenceConfig((0.5, 1.0), window=(40, 48), flip=True),
        InferenceConfig((1.0,), flip=True),
    ],
    ids=str,
)
def test_no_map_of_all_classes_at_full_resolution(config: InferenceConfig) -> None:
    K, size = 80, (81, 67)
    model, images = Network(K).float(), pictures(*size, count=1).float()
    with torch.no_grad(), LargestTensor() as largest:
        predict_labels(model, images, size, config)
    # What is largest at scale 1.5 is the network's own output, at 1/4.
    assert largest.numel <= K * size[0] * size[1] * max(1 / 7, (1.6 * max(config.scales) / 4) ** 2)
    with torch.no_grad(), LargestTensor() as plain:
        F.interpolate(model(images).logits, size).argmax(1)
    assert plain.numel == K * size[0] * size[1]  # the measure sees what it should


def test_a_single_view_is_left_to_the_fused_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "label_map", None)
    for config in (None, InferenceConfig((0.75,))):
        predict_labels(Network(), pictures(24, 24), (24, 24), config)
    with pytest.raises(TypeError):
        predict_labels(Network(), pictures(24, 24), (24, 24), InferenceConfig(flip=True))


def test_half_precision_is_averaged_in_float32(generator: torch.Generator) -> None:
    class Half(Network):
        def forward(self, images: Tensor) -> Output:
            return Output(super().forward(images).logits.bfloat16())

    config = InferenceConfig((0.75, 1.0), flip=True, window=(16, 16))
    images = pictures(37, 41)
    labels = predict_labels(Half(), images, (37, 41), config)

    class Wide(Network):
        def forward(self, images: Tensor) -> Output:
            return Output(Half()(images).logits.double())

    assert (labels == predict_labels(Wide(), images, (37, 41), config)).double().mean() > 0.999


@pytest.fixture(scope="module")
def small() -> nn.Module:
    options = {"feats_channels": 8, "transform_channels": 8, "auxiliary_weight": 0.0}
    model = models.create("fcn_mcibipp", 4, backbone="test_resnet", **options)
    return model.eval()


def test_stages(small: nn.Module, generator: torch.Generator) -> None:
    images = torch.randn(1, 3, 40, 40, generator=generator)
    two = InferenceConfig(stages=2)
    with torch.no_grad():
        expected = F.interpolate(small(images, stages=2).logits, (40, 40), mode="bilinear")
        for model in (small, small.fold()):
            assert torch.equal(predict_labels(model, images, (40, 40), two), expected.argmax(1))
        predict_labels(small, images, (40, 40), InferenceConfig((0.5, 1.0), stages=2))
        baseline = models.create("fcn", 4, backbone="test_resnet", feats_channels=8).eval()
        with pytest.raises(ValueError, match=r"stages: FCNHead has no memory"):
            predict_labels(baseline, images, (40, 40), two)


class ByTruth(nn.Module):
    """A model that must be shown the labels."""

    needs_labels = True
    head = SegmentationHead()

    def forward(self, images: Tensor, labels: Tensor) -> Output:
        assert labels.shape == (len(images), *images.shape[2:])
        return Output(F.one_hot(labels.long(), 4).permute(0, 3, 1, 2).float())


def test_labels_for_a_model_that_gathers_by_the_ground_truth() -> None:
    images, model = pictures(6, 8, 1), ByTruth()
    labels = torch.arange(4).repeat_interleave(24).view(1, 12, 8).byte()
    seen = model(images, labels[:, 1::2]).logits  # of the images' size, the nearest
    expected = F.interpolate(seen, (12, 8), mode="bilinear").argmax(1)
    assert torch.equal(predict_labels(model, images, (12, 8), labels=labels), expected)
    with pytest.raises(
        ValueError, match="gathers with the ground truth and cannot predict without it"
    ):
        predict_labels(model, images, (12, 8))
    for config in (InferenceConfig((0.5,)), InferenceConfig(flip=True)):
        with pytest.raises(
            ValueError, match=r"one pass over the whole image, not with (scales 0.5|.*flip)"
        ):
            predict_labels(model, images, (12, 8), config, labels=labels)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (InferenceConfig(()), "scales: expected positive numbers"),
        (InferenceConfig((1.0, 0.0)), "scales: expected positive numbers"),
        (InferenceConfig((float("nan"),)), "scales: expected positive numbers"),
        (InferenceConfig(window=(0, 4)), "window: expected positive sides"),
        (InferenceConfig(window=(8, 8), stride=(8, 0)), "stride: expected positive sides"),
        (InferenceConfig(window=(8, 8), stride=(4, 9)), r"stride: \(4, 9\) is more than the win"),
        (InferenceConfig(stride=(4, 4)), "needs sliding windows; give inference.window"),
        (InferenceConfig(stages=0), "stages: expected at least 1"),
        (InferenceConfig(softmax="sum"), "softmax: expected labels, stride or none"),  # type: ignore[arg-type]
        (InferenceConfig(protocol="their"), "inference.protocol: 'their' is not one of own, rel"),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_settings_that_make_no_sense(config: InferenceConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict_labels(Network(), pictures(8, 8), (8, 8), config)


def test_the_mean_of_logits_is_another_than_that_of_probabilities() -> None:
    model, images = Network(), pictures(37, 53)
    probabilities, logits = (
        predict_labels(model, images, (37, 53), InferenceConfig(flip=True, softmax=softmax))
        for softmax in ("labels", "none")
    )
    assert (probabilities != logits).double().mean() > 0.01


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (InferenceConfig(), "whole image, own protocol"),
        (InferenceConfig(protocol="released"), "whole image, released protocol"),
        (
            InferenceConfig((0.5, 1.0), True, softmax="none", stages=2),
            "scales 0.5, 1 with flip, mean of logits, 2 stages, own protocol",
        ),
        (
            InferenceConfig(flip=True, softmax="none", protocol="released"),
            "whole image with flip, released protocol",
        ),
        (
            InferenceConfig(window=(6, 9), softmax="stride"),
            "windows 6x9 by 4x6, softmax at the stride, own protocol",
        ),
        (
            InferenceConfig(window=(6, 9), softmax="stride", protocol="released"),
            "windows 6x9 by 4x6, softmax at the windows' size, released protocol",
        ),
    ],
    ids=repr,
)
def test_words_name_the_protocol(config: InferenceConfig, words: str) -> None:
    assert str(config) == words


def test_the_default_stride_is_two_thirds() -> None:
    assert InferenceConfig(window=(512, 512)).window_stride == (341, 341)
    assert InferenceConfig(window=(1, 1)).window_stride == (1, 1)


def test_models_are_tested_by_the_alignment_they_were_trained_with() -> None:
    """``align_corners`` of the head, of a model that has one."""
    options = {"feats_channels": 8, "auxiliary_weight": 0.0, "align_corners": True}
    with torch.random.fork_rng(devices=[]):
        model = models.create("fcn", 3, backbone="test_resnet", **options).eval()
    images = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(images).logits
        full = F.interpolate(logits, (40, 40), mode="bilinear", align_corners=True)
        assert torch.equal(predict_labels(model, images, (40, 40)), full.argmax(1))
