"""The released protocol beside the released package's own test, on the same weights and pictures.

Both compute in float64 from the same bytes: no label may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mcibi_fast.compat import sssegmentation
from mcibi_fast.data import LIP
from mcibi_fast.data.transforms import under_protocol
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.inference.labels import predict_labels
from mcibi_fast.models import SegmentationOutput
from mcibi_fast.models.segmentor import SegmentorWrapper
from mcibi_fast.recipes import InferenceConfig, NamedData
from tests.compat import released_test

pytest.importorskip("ssseg", reason="needs the authors' package (sssegmentation)")

NAMES = ("portrait", "landscape")


class InDouble(SegmentorWrapper):
    """The package scales images in float32, too, before the network converts them."""

    def forward(self, images: Tensor, **options: Any) -> SegmentationOutput:
        return self.model(images.double(), **options)


class Resizing(NamedTuple):
    """How a test image is resized, in this package's words and in the released one's."""

    ours: dict[str, Any]
    released: list[tuple[str, dict[str, Any]]]

    @classmethod
    def short(cls, short_side: int, long_side: int) -> Resizing:
        size = {"output_size": (long_side, short_side), "keep_ratio": True, "scale_range": None}
        return cls({"short_side": short_side, "long_side": long_side}, [("Resize", size)])

    @classmethod
    def exact(cls, height: int, width: int) -> Resizing:
        size = {"output_size": (height, width), "keep_ratio": False, "scale_range": None}
        return cls({"size": (height, width)}, [("Resize", size)])

    def __str__(self) -> str:
        return " ".join(f"{name} {value}" for name, value in self.ours.items()) or "own size"


OWN_SIZE = Resizing({}, [])
SMALLER = Resizing.short(32, 64)  # by 1.5, an odd factor; the long side bounds the landscape
LARGER = Resizing.short(71, 300)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LIP with two pictures of odd sides in the validation split; they are PNG, so no decoder
    makes a difference.
    """
    folder = tmp_path_factory.mktemp("lip")
    rng = np.random.default_rng(0)
    for kind in ("images", "segmentations"):
        (folder / f"val_{kind}").mkdir()
    for name, (height, width) in zip(NAMES, [(61, 47), (40, 97)], strict=True):
        coarse = rng.integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / "val_images" / f"{name}.jpg", "PNG")
        mask = rng.integers(0, 20, (height, width), dtype=np.uint8)
        Image.fromarray(mask).save(folder / "val_segmentations" / f"{name}.png")
    (folder / "val_id.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return folder


class Pair(NamedTuple):
    """One model of both packages."""

    settings: dict[str, Any]
    file: Path
    model: InDouble


Compare = Callable[..., None]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Builds a model with random weights; see `released_test.settings`."""
    folder, built = tmp_path_factory.mktemp("weights"), {}

    def build(**options: Any) -> Pair:
        name = str(options)
        if name not in built:
            settings = released_test.settings(**options)
            file = folder / f"{len(built)}.pth"
            torch.save({"model": released_test.random_state(settings)}, file)
            model = sssegmentation.load(file, align_corners=settings["align_corners"])
            built[name] = Pair(settings, file, InDouble(model.double()).eval())
        return built[name]

    return build


@pytest.fixture
def compare(root: Path, pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Compares the labels and the score of both packages, and that the own protocol differs."""

    def compare(
        inference: InferenceConfig,
        size: Resizing,
        *,
        own_differs: bool = True,
        **options: Any,
    ) -> None:
        settings, file, model = pair(**options)
        expected, scores = released_test.released_labels(
            settings, released_inference(inference), size.released, file, root, monkeypatch
        )
        data = NamedData("lip", str(root), **size.ours).dataset("val")
        released, own = (
            labels(model, data, replace(inference, protocol=protocol))
            for protocol in ("released", "own")
        )
        for name in NAMES:
            assert len(np.unique(expected[name])) > 1  # there is something to compare
            assert int((released[name] != expected[name]).sum()) == 0, name
        assert own_differs == any((own[name] != expected[name]).mean() > 2e-3 for name in NAMES)
        found = evaluate(model, data, inference=replace(inference, protocol="released"))
        assert found.compute().mean_iou == pytest.approx(scores["miou"], abs=1e-12)

    return compare


@torch.no_grad()
def labels(model: Any, data: Any, inference: InferenceConfig) -> dict[str, NDArray[np.int64]]:
    """By name, as `evaluate` predicts them."""
    data = under_protocol(data, inference.protocol)
    found = {}
    for sample in (data[i] for i in range(len(data))):
        predicted = predict_labels(
            model,
            sample["image"][None],
            tuple(sample["label"].shape),
            inference,
            flip_pairs=LIP.flip_pairs,
        )
        found[sample["name"]] = predicted[0].numpy()
    return found


def released_inference(inference: InferenceConfig) -> dict[str, Any]:
    """The package's settings for the same test."""
    forward: dict[str, Any] = {"mode": "whole"}
    if inference.window is not None:
        forward = {
            "mode": "slide", "cropsize": inference.window, "stride": inference.window_stride
        }  # fmt: skip
    tta: dict[str, Any] = {
        "multiscale": list(inference.scales),
        "flip": inference.flip,
        "use_probs_before_resize": inference.softmax == "stride",
    }
    if inference.stages is not None:
        tta["cascade"] = {
            "key_for_pre_output": "memory_gather_logits",
            "times": inference.stages,
            "forward_default_args": None,
        }
    return {"forward": forward, "tta": tta}


def C(*values: Any, **options: Any) -> InferenceConfig:
    return InferenceConfig(*values, **options)


@pytest.mark.parametrize(
    ("inference", "size"),
    [
        (C(), SMALLER),  # point 9: OpenCV does not filter
        (C(), Resizing.exact(37, 29)),
        (C(window=(90, 40)), SMALLER),  # point 10: windows larger than the image
        (C(window=(32, 48), softmax="stride"), OWN_SIZE),  # point 11
        (C(flip=True), OWN_SIZE),  # point 12: mean of logits
        (C((0.7, 1.3)), OWN_SIZE),  # point 13: 0.7 * 61 = 42.7 becomes 42
        (C(flip=True, stages=2), OWN_SIZE),  # point 14
        (C(softmax="stride", stages=2), OWN_SIZE),  # probabilities taken for logits
    ],
    ids=str,
)
def test_labels_are_those_of_the_released_test(
    compare: Compare, inference: InferenceConfig, size: Resizing
) -> None:
    compare(inference, size, within="aspp")


EXACT = Resizing.exact(37, 37)


EVERYTHING: list[tuple[InferenceConfig, Resizing, dict[str, Any]]] = [
    (C((0.5, 0.75, 1.0, 1.25, 1.5), True), SMALLER, {}),
    (C((0.6, 1.0), True, (41, 41)), LARGER, {}),
    (C((0.5, 1.0, 1.75), True, (41, 41), (27, 26), "stride"), OWN_SIZE, {"within": "aspp"}),
    (
        C(window=(90, 40), flip=True, softmax="stride"),
        EXACT,
        {"within": "ppm", "pyramid": True},
    ),
    (C((0.75, 1.0, 1.5), True, softmax="stride", stages=2), LARGER, {"within": "ppm"}),
    (C((0.75, 1.2), True, (41, 300), stages=2), SMALLER, {"within": "aspp", "pyramid": True}),
    (C((1.0,), True, (33, 33), softmax="stride", stages=3), OWN_SIZE, {}),
    (C((0.75, 1.3), True, stages=2), EXACT, {"within": "aspp", "align_corners": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("inference", "size", "model_settings"), EVERYTHING, ids=str)
# The others repeat, with other sizes, what these and the single settings above show.
@pytest.mark.thinned(only={"inference": [EVERYTHING[i][0] for i in (1, 2, 3, 5, 7)]})
def test_everything_at_once(
    compare: Compare, inference: InferenceConfig, size: Resizing, model_settings: dict[str, Any]
) -> None:
    compare(inference, size, **model_settings)


def test_one_whole_image_of_its_own_size_is_the_same_in_both_protocols(compare: Compare) -> None:
    compare(C(), OWN_SIZE, within="aspp", own_differs=False)
    compare(C(stages=2), OWN_SIZE, within="aspp", own_differs=False)
