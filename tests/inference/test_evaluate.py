"""Whole-image evaluation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.data import SegmentationDataset
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.inference.labels import predict_labels
from mcibi_fast.metrics import ConfusionMatrix
from mcibi_fast.models import SegmentationHead
from mcibi_fast.recipes import InferenceConfig


class Output(NamedTuple):
    logits: Tensor


class ByBrightness(nn.Module):
    """Class = brightness of the 8x8 block, as logits at 1/8; counts its passes."""

    head = SegmentationHead()
    needs_labels = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.arange(num_classes).float())
        self.batch_sizes: list[int] = []

    def forward(self, images: Tensor) -> Output:
        assert not self.training
        self.batch_sizes.append(len(images))
        small = F.avg_pool2d(images[:, :1], 8, ceil_mode=True)
        return Output(-((small - self.centres.view(1, -1, 1, 1)) ** 2))


class Blocks(SegmentationDataset):
    """Images of 8x8 blocks whose brightness is their class; sizes need not be multiples of 8."""

    classes = ("a", "b", "c", "d")
    palette = np.zeros((4, 3), np.uint8)
    mean, std = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)

    def __init__(self, sizes: list[tuple[int, int]], bad: int | None = None) -> None:
        super().__init__()
        self.sizes, self.bad = sizes, bad

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, index: int) -> str:
        return f"image_{index}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        height, width = self.sizes[index]
        rng = np.random.default_rng(index)
        blocks = rng.integers(4, size=(-(-height // 8), -(-width // 8)))
        label = blocks.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.uint8)
        image = np.repeat(label[..., None], 3, 2)
        label[0, :3] = 255
        if index == self.bad:
            label[2, 2] = 200
        return image, label


SIZES = [(16, 24), (16, 24), (13, 31), (16, 24), (9, 50), (13, 31)]


def test_counts_every_valid_pixel_and_batches_equal_sizes() -> None:
    model = ByBrightness(4).train()
    confusion = evaluate(model, Blocks(SIZES), batch_size=4)
    assert int(confusion.matrix.sum()) == sum(h * w - 3 for h, w in SIZES)
    assert model.batch_sizes == [3, 1, 1, 1]  # by size within each four
    assert model.training  # put back
    assert confusion.compute().pixel_accuracy > 0.6  # blocks blur at their borders


def test_what_was_frozen_stays_frozen() -> None:
    """A training that keeps batch norms in evaluation mode goes on so after an evaluation."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout()).train()
    whole = ByBrightness(4)
    whole.parts = model
    model[0].eval()
    evaluate(whole, Blocks([(16, 16)]))
    assert [m.training for m in (whole, model, model[0], model[1])] == [True, True, False, True]


def test_batch_size_does_not_matter() -> None:
    model = ByBrightness(4)
    alone, together = (evaluate(model, Blocks(SIZES), batch_size=n).matrix for n in (1, 6))
    assert torch.equal(alone, together)


def test_prediction_is_the_argmax_of_upsampled_logits() -> None:
    model = ByBrightness(4).eval()
    images = torch.rand(2, 3, 19, 21, generator=torch.Generator().manual_seed(0)) * 4
    prediction = predict_labels(model, images, (37, 23))
    logits = model(images).logits
    assert logits.shape[2:] == (3, 3)
    full = F.interpolate(logits, size=(37, 23), mode="bilinear", align_corners=False)
    assert torch.equal(prediction, full.argmax(1))


@pytest.mark.parametrize(
    "inference",
    [None, InferenceConfig((0.75, 1.0), flip=True), InferenceConfig(window=(16, 16))],
    ids=str,
)
def test_counts_are_those_of_the_predicted_labels(inference: InferenceConfig | None) -> None:
    model, dataset = ByBrightness(4), Blocks(SIZES)
    dataset.flip_pairs = ((0, 1),)
    expected = ConfusionMatrix(4)
    for i in range(len(dataset)):
        sample = dataset[i]
        size = (sample["label"].shape[0], sample["label"].shape[1])
        with torch.no_grad():
            prediction = predict_labels(
                model.eval(), sample["image"][None], size, inference, flip_pairs=((0, 1),)
            )
            expected.update(prediction, sample["label"][None])
    found = evaluate(model, dataset, inference=inference, batch_size=2)
    assert torch.equal(found.matrix, expected.matrix)


@pytest.mark.parametrize("inference", [None, InferenceConfig(flip=True)], ids=str)
def test_a_model_of_other_classes_is_named(inference: InferenceConfig | None) -> None:
    with pytest.raises(ValueError, match="num_classes: is 4, but the logits have 5 classes"):
        evaluate(ByBrightness(5), Blocks(SIZES), inference=inference)


def test_a_bad_label_names_its_image() -> None:
    with pytest.raises(ValueError, match=r"image_2: labels: value 200 at \(b=0, y=2, x=2\)"):
        evaluate(ByBrightness(4), Blocks(SIZES, bad=2))
    with pytest.raises(ValueError, match=r"image_2: label: value 200 is outside"):
        evaluate(ByBrightness(4), Blocks(SIZES, bad=2), inference=InferenceConfig(flip=True))


def test_a_model_that_needs_the_labels_is_shown_them() -> None:
    class ByTruth(ByBrightness):
        needs_labels = True

        def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
            assert labels is not None and labels.shape == (len(images), *images.shape[2:])
            known = labels.long().where(labels != 255, 0)
            return Output(F.one_hot(known, 4).permute(0, 3, 1, 2).float())

    model = ByTruth(4)
    assert evaluate(model, Blocks(SIZES), batch_size=3).compute().pixel_accuracy == 1
    with pytest.raises(ValueError, match="gathers with the ground truth"):
        evaluate(model, Blocks(SIZES), inference=InferenceConfig((0.5,)))


def test_an_interrupt_ends_the_evaluation_after_a_batch() -> None:
    model = ByBrightness(4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, Blocks(SIZES), interrupted=lambda: len(model.batch_sizes) == 2)
    assert model.batch_sizes == [1, 1]
