"""Class weights of the losses, from how often each class occurs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from mcibi_fast.data.loading import evaluation_loader
from mcibi_fast.nn.losses import PixelLoss
from mcibi_fast.progress import Progress
from mcibi_fast.recipes.parts import LossConfig

if TYPE_CHECKING:
    from mcibi_fast.data import SegmentationDataset


def resolve_class_weights(
    config: LossConfig,
    dataset: SegmentationDataset,
    accelerator: Accelerator,
    *,
    workers: int = 0,
    progress: bool = False,
) -> LossConfig:
    """The losses with ``class_weights`` as a list of numbers, "balanced" replaced by its values.

    Raises:
        ValueError: another number of weights than the dataset has classes.
    """
    weights = config.class_weights
    if weights == "balanced":
        pixels = class_pixels(dataset, accelerator, workers=workers, progress=progress)
        weights = balanced_weights(pixels)
    if weights is not None and len(weights) != len(dataset.classes):
        raise ValueError(
            f"loss.class_weights: {len(weights)} weights, but the data has "
            f"{len(dataset.classes)} classes"
        )
    return replace(config, class_weights=weights)


def build_loss(config: LossConfig) -> PixelLoss:
    """The losses of all heads."""
    assert not isinstance(config.class_weights, str)
    return PixelLoss(
        class_weights=config.class_weights,
        label_smoothing=config.label_smoothing,
        ohem_threshold=config.ohem_threshold,
        ohem_min_kept=config.ohem_min_kept,
        cross_entropy=config.cross_entropy,
        dice=config.dice,
        lovasz=config.lovasz,
        focal=config.focal,
        focal_gamma=config.focal_gamma,
    )


def balanced_weights(pixels: Tensor) -> list[float]:
    """``w_c = a / ln(1.02 + p_c)`` with p_c the share of class c (ENet, arXiv 1606.02147).

    Unlike 1 / p_c they stay within a factor of 36 of each other. ``a`` makes their mean over the
    labelled pixels, sum_c p_c w_c, one: the loss keeps its scale.

    Args:
        pixels: (K,) labelled pixels of each class.

    Raises:
        ValueError: no pixel is labelled.
    """
    if not bool(pixels.any()):
        raise ValueError("loss.class_weights: balanced, but no pixel of the split is labelled")
    share = pixels.double() / pixels.sum()
    weights = 1 / (1.02 + share).log()
    return (weights / (share * weights).sum()).tolist()


def class_pixels(
    dataset: SegmentationDataset,
    accelerator: Accelerator,
    *,
    workers: int = 0,
    progress: bool = False,
) -> Tensor:
    """(K,) int64: the pixels of each class in a whole split, read once, shared among ranks."""
    counted = copy.copy(dataset)
    counted.transform = _Histogram(len(dataset.classes))
    rank, world_size = accelerator.process_index, accelerator.num_processes
    batches = evaluation_loader(counted, rank=rank, world_size=world_size, workers=workers)
    total = torch.zeros(len(dataset.classes), dtype=torch.int64)
    images = len(range(rank, len(dataset), world_size))
    with Progress("count classes", unit="image", total=images, show=progress) as shown:
        for groups in batches:
            for batch in groups:
                total += batch["label"].sum(0)
                shown.advance(len(batch["label"]))
    total = total.to(accelerator.device)
    return accelerator.reduce(total, "sum").cpu()


class _Histogram:
    """A transform that replaces the label by the number of pixels of each class."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(
        self, image: Tensor, label: Tensor, *, epoch: int, index: int
    ) -> tuple[Tensor, Tensor]:
        values = label.numpy().ravel()
        known = values[(values >= 0) & (values < self.num_classes)]
        counts = np.bincount(known, minlength=self.num_classes)
        return image[:, :1, :1].float(), torch.from_numpy(counts.astype(np.int64))
