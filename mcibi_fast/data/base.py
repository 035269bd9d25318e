"""The base of all datasets: samples are dictionaries, and augmentation is drawn per epoch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mcibi_fast.data.notes import Notes
from mcibi_fast.defaults import IGNORE_INDEX


class Sample(TypedDict):
    """One sample: ``image`` (3, H, W) float32 normalised, ``label`` (H, W) integer, ``name``."""

    image: Tensor
    label: Tensor
    name: str


class Transform(Protocol):
    """uint8 ``image`` (3, H, W) and integer ``label`` (H, W) -> float32 image and label.

    An image may also be a clip (T, 3, H, W), which is transformed as a whole. Whatever is random
    comes from a generator seeded by (the transform's seed, epoch, index).
    """

    def __call__(
        self, image: Tensor, label: Tensor, *, epoch: int, index: int
    ) -> tuple[Tensor, Tensor]: ...


class SegmentationDataset(Dataset[Sample]):
    """Base class: subclasses give `__len__`, `read` and `name`, and the attributes below.

    Attributes: ``classes`` (K names), ``palette`` (K, 3) uint8, ``mean`` and ``std`` (three floats
    each, of colours in 0..1), ``ignore_index`` (255), ``flip_pairs`` (classes that a mirrored image
    swaps, such as left and right arm), ``transform`` (None: only normalise), ``notes`` (what `read`
    has to say about files that it accepts).
    """

    ignore_index = IGNORE_INDEX
    flip_pairs: tuple[tuple[int, int], ...] = ()
    classes: list[str]
    palette: NDArray[np.uint8]
    mean: Sequence[float]
    std: Sequence[float]

    def __init__(self, transform: Transform | None = None) -> None:
        self.transform = transform
        self.notes = Notes()
        # Shared memory: workers that outlive an epoch see the new one too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """Sample ``index`` without any transform: image (H, W, 3) uint8 and label (H, W)."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The sample's name, unique within the dataset."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn; holds for running workers as well."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a dataset with {len(self)} samples")
        index %= len(self)
        image, label = self.transformed(*self.read(index), index)
        return {"image": image, "label": label, "name": self.name(index)}

    def transformed(
        self, pixels: NDArray[np.uint8], mask: NDArray[np.integer], index: int
    ) -> tuple[Tensor, Tensor]:
        """Pixels (..., H, W, 3) and mask (H, W) -> image (..., 3, H, W) float32 and label."""
        image = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).movedim(-1, -3)
        label = torch.from_numpy(mask)
        if self.transform is None:
            return normalise(image, self.mean, self.std), label
        return self.transform(image, label, epoch=self.epoch, index=index)


_Dataset = TypeVar("_Dataset", bound=SegmentationDataset)


def renormalised(
    dataset: _Dataset, normalisation: tuple[Sequence[float], Sequence[float]] | None
) -> _Dataset:
    """The dataset with its images, and those of its transform, normalised by other numbers.

    Args:
        dataset: it stays as it is.
        normalisation: mean and standard deviation, such as a model's
            (`mcibi_fast.models.Segmentor.normalisation`); None keeps the dataset's own.
    """
    if normalisation is None:
        return dataset
    mean, std = map(tuple, normalisation)
    if (mean, std) == (tuple(dataset.mean), tuple(dataset.std)):
        return dataset
    changed: list[Any] = [copy.copy(dataset)]
    if hasattr(dataset.transform, "mean"):
        changed.append(copy.copy(dataset.transform))
        changed[0].transform = changed[1]
    for each in changed:
        each.mean, each.std = mean, std
    return changed[0]


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (..., 3, H, W) -> float32, (image / 255 - mean) / std per channel."""
    colours = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return normalise_in_place(colours, mean, std)


def normalise_in_place(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """As `normalise`, for colours from 0 to 255 that are floats."""
    m = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
    s = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
    return image.div_(255).sub_(m).div_(s)
