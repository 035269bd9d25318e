"""The released protocol against plain loops, and what it does not do.

tests/compat/test_released_protocol.py compares it with the released package itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast import models
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.inference.labels import check_model, predict_labels
from mcibi_fast.inference.pictures import Picture
from mcibi_fast.inference.stream import VideoPredictor
from mcibi_fast.recipes import InferenceConfig
from tests.inference.test_labels import LargestTensor, Network, Output, pictures

K, PAIRS = 6, ((1, 2), (3, 5))
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def C(*values: Any, **options: Any) -> InferenceConfig:
    return InferenceConfig(*values, protocol="released", **options)


class Iterated(Network):
    """Mixes the logits of the stage before into its own; both know left from right."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.head.has_memory, self.head.stages = True, 1  # type: ignore[misc]

    def forward(  # type: ignore[override]
        self, images: Tensor, *, stages: int, previous_logits: Tensor | None = None
    ) -> Output:
        assert stages == 1
        logits = super().forward(images).logits
        if previous_logits is None:
            return Output(logits)
        align = self.head.align_corners
        past = F.interpolate(
            previous_logits, logits.shape[2:], mode="bilinear", align_corners=align
        )
        return Output(2 * logits - past.roll(1, 1))


def naive(model: Network, images: Tensor, size: tuple[int, int], config: InferenceConfig) -> Tensor:
    """Everything at full resolution, one step after another."""
    align = model.head.align_corners

    def at(values: Tensor, size: Any) -> Tensor:
        return F.interpolate(values, tuple(size), mode="bilinear", align_corners=align)

    maps: list[Tensor] = []
    for stage in range(config.stages or 1):
        options: dict[str, Any] = {"stages": 1} if config.stages else {}
        if stage:
            options["previous_logits"] = sum(at(m, maps[-1].shape[2:]) for m in maps) / len(maps)
        maps = []
        for scale in config.scales:
            scaled = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=align)
            for flip in (False, True) if config.flip else (False,):
                view = naive_view(model, scaled.flip(3) if flip else scaled, config, options)
                if flip:
                    order = [0, 2, 1, 5, 4, 3]
                    view = view[:, order].flip(3)
                maps.append(view)
    return sum(at(m, size) for m in maps).argmax(1)  # type: ignore[union-attr]


def naive_view(model: Any, images: Tensor, config: InferenceConfig, options: Any) -> Tensor:
    probable = (lambda x: x.softmax(1)) if config.softmax == "stride" else lambda x: x
    if config.window is None:
        return probable(model(images, **options).logits)
    height, width = images.shape[2:]
    h, w = (min(a, b) for a, b in zip(config.window, (height, width), strict=True))
    down, right = config.window_stride
    total, count = torch.zeros(len(images), K, height, width, dtype=images.dtype), 0 * images[0, 0]
    tops, lefts = (
        [*range(0, height - h, down), height - h],
        [*range(0, width - w, right), width - w],
    )
    for top in tops:
        for left in lefts:
            part = (..., slice(top, top + h), slice(left, left + w))
            logits = model(images[part], **options).logits
            align = model.head.align_corners
            logits = F.interpolate(logits, (h, w), mode="bilinear", align_corners=align)
            total[part] += probable(logits)
            count[part] += 1
    return total / count


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        C(),
        C((0.7,)),
        C((0.5, 0.7, 1.0, 1.25), flip=True),
        C((0.75, 1.5), softmax="stride"),
        C(window=(16, 24)),
        C(window=(80, 90), flip=True, softmax="stride"),
        C((0.5, 1.3), window=(29, 18), stride=(10, 13), flip=True, softmax="stride"),
        C((0.5, 1.0), window=(64, 20), flip=True),
        C(stages=3),
        C((0.7, 1.2), flip=True, stages=2),
        C((0.7, 1.2), window=(20, 64), flip=True, softmax="stride", stages=3),
    ],
    ids=str,
)
def test_equals_the_plain_way(config: InferenceConfig, align_corners: bool) -> None:
    model: Network = (Iterated if config.stages else Network)(align_corners=align_corners)
    images, size = pictures(37, 53), (61, 47)
    with torch.no_grad():
        labels = predict_labels(model, images, size, config, flip_pairs=PAIRS)
        expected = naive(model, images, size, config)
    assert torch.equal(labels, expected)
    assert len(expected.unique()) > 3


@pytest.mark.parametrize("softmax", ["labels", "none"])
def test_there_are_no_probabilities_at_the_size_of_the_labels(softmax: Any) -> None:
    config = C(flip=True, softmax=softmax)
    model, images = Network(), pictures(24, 24)
    expected = predict_labels(model, images, (24, 24), C(flip=True), flip_pairs=PAIRS)
    assert torch.equal(predict_labels(model, images, (24, 24), config, flip_pairs=PAIRS), expected)


def test_windows_are_at_most_as_large_as_the_image() -> None:
    model = Network()
    predict_labels(model, pictures(37, 53), (37, 53), C(window=(40, 32)))
    assert set(model.seen) == {(37, 32)}


def test_a_scale_that_leaves_nothing_is_named() -> None:
    with pytest.raises(ValueError, match=r"scales: 0\.5 leaves nothing of an image of 1x9"):
        predict_labels(Network(), pictures(1, 9), (1, 9), C((0.5,)))


def test_no_map_of_all_classes_at_full_resolution() -> None:
    classes, size = 80, (81, 67)
    model, images = Network(classes).float(), pictures(*size, count=1).float()
    with torch.no_grad(), LargestTensor() as largest:
        predict_labels(model, images, size, C((0.5, 1.0, 1.5), flip=True))
    assert largest.numel <= classes * size[0] * size[1] * max(1 / 7, (1.6 * 1.5 / 4) ** 2)


@pytest.mark.parametrize("config", [C(window=(24, 32)), C((0.7, 1.0), flip=True)], ids=str)
def test_a_picture_gives_what_its_normalised_image_gives(config: InferenceConfig) -> None:
    pixels = torch.randint(0, 256, (3, 45, 71), dtype=torch.uint8)
    picture = Picture(pixels, MEAN, STD, torch.device("cpu"), "released")
    model = Network().float()
    with torch.no_grad():
        found = predict_labels(model, picture, (45, 71), config, flip_pairs=PAIRS)
        expected = predict_labels(model, picture.whole(), (45, 71), config, flip_pairs=PAIRS)
    assert torch.equal(found, expected)


def network(name: str = "fcn_mcibipp", **options: Any) -> Any:
    options = {"feats_channels": 8, "transform_channels": 8, "auxiliary_weight": 0.0, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.create(name, K, backbone="test_resnet", **options)
        model.memory.memory.normal_(0.5, 0.5)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.out_channels == K:
                module.weight.data.mul_(30)
    with torch.no_grad():  # otherwise one class wins everywhere
        logits = model.eval()(random_images(4)).logits
        model.head.decoder.classifier.bias.sub_(logits.mean((0, 2, 3)))
    return model


def random_images(count: int) -> Tensor:
    return torch.randn(count, 3, 40, 56, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_stages_of_one_whole_image_are_those_of_the_own_protocol() -> None:
    model, images = network(), random_images(2)
    for changed in (model, model.fold()):
        own, released = (
            predict_labels(changed, images, (40, 56), InferenceConfig(stages=3, protocol=protocol))
            for protocol in ("own", "released")
        )
        assert torch.equal(own, released)
    one, two = (
        predict_labels(model, images, (40, 56), C(flip=True, stages=stages)) for stages in (1, 2)
    )
    assert not torch.equal(one, two)
    for number, expected in ((1, one), (2, two)):
        model.head.stages = number  # what the model does if nothing is said
        assert torch.equal(predict_labels(model, images, (40, 56), C(flip=True)), expected)


@torch.no_grad()
def test_stages_in_mixed_precision() -> None:
    model, images = network(), random_images(1)
    config = C((1.0,), True, (24, 24), softmax="stride", stages=2)
    plain = predict_labels(model, images, (40, 56), config)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = predict_labels(model, images, (40, 56), config)
    assert (plain == mixed).double().mean() > 0.9


@torch.no_grad()
def test_videos() -> None:
    """An image model treats each frame as an image; a video model has one stage."""
    model, frames = network(), random_images(3)
    config = C((0.75, 1.0), True, stages=2)
    predictor = VideoPredictor(model, config, flip_pairs=PAIRS)
    for frame in frames:
        expected = predict_labels(model, frame[None], (40, 56), config, flip_pairs=PAIRS)[0]
        assert torch.equal(predictor.predict(frame, (40, 56)), expected)
    video = network("fcn_video_mcibipp", history=1)
    check_model(video, replace(config, stages=1))
    check_model(video, replace(config, stages=2, protocol="own"))
    with pytest.raises(ValueError, match=r"stages: the released protocol .* a video model cannot"):
        check_model(video, config)
    predictor = VideoPredictor(video, C(flip=True), flip_pairs=PAIRS)
    assert predictor.predict(frames[0], (40, 56)).shape == (40, 56)


def test_evaluate_prepares_images_by_the_protocol() -> None:
    """The counts are those of images that the released protocol resized and normalised."""
    from mcibi_fast.data import EvalTransform, Scenes
    from mcibi_fast.data.transforms import under_protocol

    data = Scenes("val", count=2, size=(64, 96), seed=0)
    data.transform = EvalTransform(mean=data.mean, std=data.std, short_side=41)
    model = Network(len(data.classes)).float()
    found, own = (
        evaluate(model, data, inference=InferenceConfig((0.7,), protocol=protocol)).matrix
        for protocol in ("released", "own")
    )
    expected = torch.zeros_like(found)
    for sample in (under_protocol(data, "released")[i] for i in range(2)):
        label = sample["label"]
        with torch.no_grad():
            labels = predict_labels(model, sample["image"][None], (64, 96), C((0.7,)))[0]
        for truth, predicted in zip(
            label.flatten().tolist(), labels.flatten().tolist(), strict=True
        ):
            if truth != data.ignore_index:
                expected[truth, predicted] += 1
    assert torch.equal(found, expected)
    assert not torch.equal(found, own)
