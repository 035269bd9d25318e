"""What a report shows: trained models, and samples of the split they are evaluated on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mcibi_fast.data import SegmentationDataset
from mcibi_fast.models import Segmentor
from mcibi_fast.reports.curves import History
from mcibi_fast.reports.gathering import model_input
from mcibi_fast.reports.sheets import Scene
from mcibi_fast.viz.overlay import fit, to_pixels


@dataclass(frozen=True)
class Trained:
    """A trained model that the report shows.

    Attributes:
        name: what the report calls it.
        model: in evaluation mode.
        history: of its training.
    """

    name: str
    model: Segmentor
    history: History = ()


class Samples:
    """Samples at even intervals through a split, not selected by their results.

    Args:
        dataset: with the transform of its evaluation.
        count: at most so many samples.
    """

    def __init__(self, dataset: SegmentationDataset, count: int) -> None:
        self.dataset = dataset
        self.indices = spread(len(dataset), count)
        self.labels: list[Tensor] = []
        self.scenes: list[Scene] = []
        for sample in (dataset[index] for index in self.indices):
            label = sample["label"]
            pixels = to_pixels(sample["image"], dataset.mean, dataset.std)
            if pixels.shape[:2] != label.shape:  # evaluated at another size than the label's
                pixels = fit(pixels, label.shape[1], smooth=True)
            self.labels.append(label)
            self.scenes.append(Scene(sample["name"], pixels, label.numpy()))

    def inputs(self, model: Segmentor) -> Iterator[Tensor]:
        """Each sample as a batch for this model, see `model_input`."""
        return (model_input(model, self.dataset, index) for index in self.indices)


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` indices below ``total`` at even intervals, with the first and the last."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).astype(int)).tolist()
