"""A confusion matrix that is filled batch by batch, and the scores computed from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor

from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.terminal import printable

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class SegmentationMetrics:
    """Scores of one split. All are fractions in [0, 1], and NaN if they are undefined.

    Attributes:
        iou: (K,) float64, intersection over union per class; NaN if the union is empty.
        accuracy: (K,) float64, share of a class's pixels that were predicted correctly; NaN if the
            class has no ground truth.
        pixels: (K,) int64, number of ground-truth pixels per class.
        dice: (K,) float64, 2 |A and B| / (|A| + |B|) per class (the F1 score); NaN as for ``iou``.
        precision: (K,) float64, share of the pixels predicted as a class that are of it; NaN if
            none is predicted. (``accuracy`` is the recall.)
        mean_iou: mean of ``iou`` over classes with a non-empty union (the default, as in most
            toolkits).
        mean_iou_present: mean of ``iou`` over classes with ground truth (as in VSPW's evaluation).
            It differs from ``mean_iou`` only if a class is predicted that never occurs.
        pixel_accuracy: share of all pixels that were predicted correctly.
        mean_class_accuracy: mean of ``accuracy`` over classes with ground truth.
    """

    iou: Tensor
    accuracy: Tensor
    pixels: Tensor
    mean_iou: float
    mean_iou_present: float
    pixel_accuracy: float
    mean_class_accuracy: float
    dice: Tensor | None = None
    precision: Tensor | None = None

    def summary(self) -> dict[str, float]:
        """The four scalar scores by name; of two classes also those of class 1, the foreground."""
        scores = {
            "mean_iou": self.mean_iou,
            "mean_iou_present": self.mean_iou_present,
            "pixel_accuracy": self.pixel_accuracy,
            "mean_class_accuracy": self.mean_class_accuracy,
        }
        return scores | self.foreground()

    def foreground(self) -> dict[str, float]:
        """Scores of class 1 of two: IoU, Dice, precision and recall; empty for other numbers."""
        if len(self.iou) != 2 or self.dice is None or self.precision is None:
            return {}
        named = {
            "iou": self.iou,
            "dice": self.dice,
            "precision": self.precision,
            "recall": self.accuracy,
        }
        return {f"foreground_{name}": float(values[1]) for name, values in named.items()}

    def without(self, classes: Sequence[int]) -> SegmentationMetrics:
        """The scores with means over the other classes; the given classes become NaN.

        Pixels of the given classes still count in the scores of the others and in
        ``pixel_accuracy``.
        """
        iou, accuracy = self.iou.clone(), self.accuracy.clone()
        iou[list(classes)] = accuracy[list(classes)] = math.nan
        return replace(
            self,
            iou=iou,
            accuracy=accuracy,
            mean_iou=float(iou.nanmean()),
            mean_iou_present=float(iou[self.pixels > 0].nanmean()),
            mean_class_accuracy=float(accuracy.nanmean()),
        )

    def as_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """Scores and per-class rows as plain numbers (None for NaN), ready for JSON."""
        rows = zip(
            classes, self.iou.tolist(), self.accuracy.tolist(), self.pixels.tolist(), strict=True
        )
        per_class = [
            {"class": name, "iou": _or_none(iou), "accuracy": _or_none(acc), "pixels": pixels}
            for name, iou, acc, pixels in rows
        ]
        return {name: _or_none(x) for name, x in self.summary().items()} | {"classes": per_class}

    def table(self, classes: Sequence[str]) -> str:
        """Per-class text table (percent) with the scalar scores below it.

        "mIoU (union)" is ``mean_iou``, over classes with a non-empty union; "mIoU (present)" is
        ``mean_iou_present``, over classes with ground truth.
        """
        names = [printable(name) for name in classes]
        width = max([len(name) for name in names] + [len("mean class accuracy")])
        total = max(int(self.pixels.sum()), 1)
        lines = [f"{'class':<{width}}    IoU    acc  pixels"]
        for name, iou, acc, pixels in zip(
            names, self.iou.tolist(), self.accuracy.tolist(), self.pixels.tolist(), strict=True
        ):
            share = 100 * pixels / total
            lines.append(f"{name:<{width}} {_percent(iou)} {_percent(acc)} {share:6.2f}%")
        for label, value in (
            ("mIoU (union)", self.mean_iou),
            ("mIoU (present)", self.mean_iou_present),
            ("pixel accuracy", self.pixel_accuracy),
            ("mean class accuracy", self.mean_class_accuracy),
        ):
            lines.append(f"{label:<{width}} {_percent(value)}")
        for name, value in self.foreground().items():
            label = name.removeprefix("foreground_").replace("iou", "IoU").replace("dice", "Dice")
            lines.append(f"{f'{label} of {names[1]}':<{width}} {_percent(value)}")
        return "\n".join(lines)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(value: float) -> str:
    return "     -" if math.isnan(value) else f"{100 * value:6.2f}"


class ConfusionMatrix:
    """Counts of (ground truth, prediction) pairs, added up batch by batch in int64.

    One matrix counts a whole split, so no score is an average of averages. An update allocates a
    few integers per pixel and nothing of K times the label map's size.

    Args:
        num_classes: K.
        ignore_index: label of pixels that do not count.

    Attributes:
        matrix: (K, K) int64; row = ground truth, column = prediction.
    """

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Adds one batch.

        Args:
            prediction: class indices of any integer dtype, any shape.
            label: ground truth of the same shape, any integer dtype.

        Raises:
            TypeError: a tensor is not of an integer dtype.
            ValueError: shapes differ; a label is outside [0, K) and not ``ignore_index``; a
                prediction at a valid pixel is outside [0, K).
        """
        for name, tensor in (("prediction", prediction), ("label", label)):
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                raise TypeError(f"{name}: expected class indices, got dtype {tensor.dtype}")
        if prediction.shape != label.shape:
            raise ValueError(
                f"prediction: shape {tuple(prediction.shape)} differs from label's "
                f"{tuple(label.shape)}"
            )
        label = label.to(prediction.device, torch.int64)
        valid = label != self.ignore_index
        label, prediction = label[valid], prediction[valid].to(torch.int64)
        self._check("label", label, f" and is not ignore_index ({self.ignore_index})")
        self._check("prediction", prediction, "")
        k = self.num_classes
        counts = torch.bincount(label * k + prediction, minlength=k * k).view(k, k)
        self.add(counts)

    def add(self, counts: Tensor) -> None:
        """Adds pairs that were counted elsewhere, as ``ops.upsample_confusion`` does.

        Args:
            counts: (K, K) int64; row = ground truth, column = prediction.

        Raises:
            ValueError: another shape or dtype.
        """
        if counts.shape != self.matrix.shape or counts.dtype != torch.int64:
            raise ValueError(
                f"counts: expected int64 of shape {tuple(self.matrix.shape)}, "
                f"got {counts.dtype} of shape {tuple(counts.shape)}"
            )
        self.matrix = self.matrix.to(counts.device) + counts

    def _check(self, name: str, values: Tensor, suffix: str) -> None:
        bad = (values < 0) | (values >= self.num_classes)
        if bad.any():
            value = int(values[bad][0])
            raise ValueError(f"{name}: value {value} is outside [0, {self.num_classes}){suffix}")

    def reduce(
        self, accelerator_or_group: Accelerator | torch.distributed.ProcessGroup | None = None
    ) -> ConfusionMatrix:
        """The sum over ranks, as a new object (so that reducing twice counts nothing twice).

        No two ranks may have counted the same sample: `inference.evaluate` distributes a split over
        the ranks without padding.

        Args:
            accelerator_or_group: an ``accelerate.Accelerator``, a process group, or None for the
                default process group. Without an initialised process group the result is a copy.
        """
        total = ConfusionMatrix(self.num_classes, self.ignore_index)
        total.matrix = self.matrix.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = getattr(accelerator_or_group, "device", None)
            group = None
            if isinstance(accelerator_or_group, torch.distributed.ProcessGroup):
                group = accelerator_or_group
            elif device is not None:
                total.matrix = total.matrix.to(device)
            torch.distributed.all_reduce(total.matrix, group=group)
        return total

    def compute(self) -> SegmentationMetrics:
        """The scores of everything counted so far."""
        matrix = self.matrix.cpu().double()
        hit, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        union = truth + predicted - hit
        # 0/0 gives NaN: there is no pixel from which to judge that class.
        iou, accuracy = hit / union, hit / truth
        return SegmentationMetrics(
            iou=iou,
            accuracy=accuracy,
            pixels=self.matrix.sum(1).cpu(),
            mean_iou=float(iou.nanmean()),
            mean_iou_present=float(iou[truth > 0].mean()),
            pixel_accuracy=float(hit.sum() / matrix.sum()),
            mean_class_accuracy=float(accuracy.nanmean()),
            dice=2 * hit / (truth + predicted),
            precision=hit / predicted,
        )
