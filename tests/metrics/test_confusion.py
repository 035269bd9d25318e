"""The streaming confusion matrix against hand-worked cases and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassJaccardIndex,
)

from mcibi_fast.metrics import ConfusionMatrix


def random_maps(
    num_classes: int, shape: tuple[int, ...], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(num_classes, shape, generator=generator)
    label = torch.randint(num_classes, shape, generator=generator)
    # Half right, so that scores differ between classes; some pixels ignored.
    keep = torch.rand(shape, generator=generator)
    label = torch.where(keep < 0.5, prediction, label)
    return prediction, torch.where(keep > 0.9, 255, label)


def test_hand_worked() -> None:
    label = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 255]])
    prediction = torch.tensor([[0, 0, 1, 1], [1, 2, 2, 0]])
    confusion = ConfusionMatrix(3)
    confusion.update(prediction, label)
    assert confusion.matrix.tolist() == [[2, 1, 0], [0, 2, 1], [0, 0, 1]]
    metrics = confusion.compute()
    assert metrics.iou.tolist() == [2 / 3, 2 / 4, 1 / 2]
    assert metrics.accuracy.tolist() == [2 / 3, 2 / 3, 1.0]
    assert metrics.pixels.tolist() == [3, 3, 1]
    assert metrics.mean_iou == pytest.approx((2 / 3 + 0.5 + 0.5) / 3, abs=1e-15)
    assert metrics.pixel_accuracy == 5 / 7
    assert metrics.mean_class_accuracy == pytest.approx((2 / 3 + 2 / 3 + 1) / 3, abs=1e-15)


def test_two_conventions_for_a_class_without_ground_truth() -> None:
    # Class 2 is predicted but never true; class 3 is neither.
    confusion = ConfusionMatrix(4)
    confusion.update(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1]))
    metrics = confusion.compute()
    assert metrics.iou[:3].tolist() == [1.0, 0.5, 0.0] and math.isnan(metrics.iou[3])
    assert metrics.mean_iou == 0.5  # (1 + 0.5 + 0) / 3: class 2 has a union
    assert metrics.mean_iou_present == 0.75  # (1 + 0.5) / 2: only classes with ground truth
    assert metrics.mean_class_accuracy == 0.75
    assert metrics.as_dict(["a", "b", "c", "d"])["classes"][3]["iou"] is None
    assert metrics.table(["a", "b", "c", "d"]).splitlines()[4].split() == ["d", "-", "-", "0.00%"]


@pytest.mark.parametrize("num_classes", [2, 11, 150])
def test_against_torchmetrics(num_classes: int) -> None:
    confusion = ConfusionMatrix(num_classes)
    theirs = {
        "matrix": MulticlassConfusionMatrix(num_classes, ignore_index=255),
        "iou": MulticlassJaccardIndex(num_classes, average="none", ignore_index=255),
        "mean_iou": MulticlassJaccardIndex(num_classes, average="macro", ignore_index=255),
        "pixel": MulticlassAccuracy(num_classes, average="micro", ignore_index=255),
        "mean_accuracy": MulticlassAccuracy(num_classes, average="macro", ignore_index=255),
    }
    for seed in range(3):
        prediction, label = random_maps(num_classes, (2, 37, 41), seed)
        confusion.update(prediction, label)
        for metric in theirs.values():
            metric.update(prediction, label)
    metrics = confusion.compute()
    assert torch.equal(confusion.matrix, theirs["matrix"].compute())
    torch.testing.assert_close(metrics.iou.float(), theirs["iou"].compute())
    assert metrics.mean_iou == pytest.approx(float(theirs["mean_iou"].compute()), abs=1e-6)
    assert metrics.pixel_accuracy == pytest.approx(float(theirs["pixel"].compute()), abs=1e-6)
    assert metrics.mean_class_accuracy == pytest.approx(
        float(theirs["mean_accuracy"].compute()), abs=1e-6
    )


def test_batches_add_up_whatever_their_split_and_dtype() -> None:
    prediction, label = random_maps(19, (6, 13, 17), seed=7)
    whole, parts = ConfusionMatrix(19), ConfusionMatrix(19)
    whole.update(prediction, label)
    parts.update(prediction[:1].to(torch.uint8), label[:1].to(torch.uint8))
    parts.update(prediction[1:].int().transpose(1, 2), label[1:].short().transpose(1, 2))
    assert torch.equal(whole.matrix, parts.matrix)
    assert int(whole.matrix.sum()) == int((label != 255).sum())


def test_counted_matrices_add_up() -> None:
    prediction, label = random_maps(5, (2, 13, 17), seed=3)
    whole, parts = ConfusionMatrix(5), ConfusionMatrix(5)
    whole.update(prediction, label)
    for image in range(2):
        one = ConfusionMatrix(5)
        one.update(prediction[image], label[image])
        parts.add(one.matrix)
    assert torch.equal(whole.matrix, parts.matrix)
    for wrong in (torch.zeros(4, 4, dtype=torch.int64), torch.zeros(5, 5)):
        with pytest.raises(ValueError, match=r"counts: expected int64 of shape \(5, 5\)"):
            parts.add(wrong)


def test_negative_ignore_index_with_unsigned_labels() -> None:
    # 156 is -100 modulo 256: a uint8 comparison with -100 would ignore it.
    confusion = ConfusionMatrix(157, ignore_index=-100)
    confusion.update(
        torch.tensor([156, 0], dtype=torch.uint8), torch.tensor([156, 0]).to(torch.uint8)
    )
    assert int(confusion.matrix.sum()) == 2


def test_nothing_counted_is_nan_not_zero() -> None:
    confusion = ConfusionMatrix(3)
    confusion.update(torch.zeros(4, dtype=torch.long), torch.full((4,), 255))
    metrics = confusion.compute()
    assert all(math.isnan(value) for value in metrics.summary().values())


@pytest.mark.parametrize(
    ("prediction", "label", "error", "message"),
    [
        ([0, 1], [0, 200], ValueError, r"label: value 200 is outside \[0, 19\)"),
        ([0, 1], [0, -1], ValueError, r"label: value -1 is outside \[0, 19\)"),
        ([0, 19], [0, 1], ValueError, r"prediction: value 19 is outside \[0, 19\)"),
        ([0, 1, 2], [0, 1], ValueError, r"prediction: shape \(3,\) differs from label's \(2,\)"),
        ([0.5, 1.0], [0, 1], TypeError, "prediction: expected class indices"),
        ([0, 1], [True, False], TypeError, "label: expected class indices"),
    ],
)
def test_errors(prediction: list, label: list, error: type, message: str) -> None:
    confusion = ConfusionMatrix(19)
    with pytest.raises(error, match=message):
        confusion.update(torch.tensor(prediction), torch.tensor(label))
    assert int(confusion.matrix.sum()) == 0


def test_reduce_without_process_group_is_a_copy() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    total = confusion.reduce()
    total.update(torch.tensor([0]), torch.tensor([0]))
    assert int(confusion.matrix.sum()) == 2 and int(total.matrix.sum()) == 3
