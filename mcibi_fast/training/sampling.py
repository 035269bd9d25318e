"""Class-balanced sampling: the order of an epoch's images, by the classes that occur in them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from mcibi_fast.data.loading import evaluation_loader
from mcibi_fast.data.video import ClipDataset
from mcibi_fast.progress import Progress
from mcibi_fast.training.data import describe_split
from mcibi_fast.training.processes import on_main
from mcibi_fast.training.run import Run

if TYPE_CHECKING:
    from mcibi_fast.data import SegmentationDataset

_ORDER = 4  # keeps the draws apart from others with the same seed and epoch


class ClassBalance:
    """Draws images so that every class that occurs is drawn equally often.

    An epoch has as many draws as there are images. Each draws a class, all that occur as likely,
    and then takes the next image from that class's own shuffled list, which starts again at its
    end: a rare class's images come several times before another's come once. Images without any
    class are not drawn.

    The order depends only on (seed, epoch) and on the classes in the images.

    Args:
        classes: of each image, the classes that occur in it.

    Raises:
        ValueError: no image has a class.
    """

    def __init__(self, classes: list[list[int]]) -> None:
        self.images: dict[int, list[int]] = {}
        for index, present in enumerate(classes):
            for k in present:
                self.images.setdefault(k, []).append(index)
        self.length = len(classes)
        if not self.images:
            raise ValueError("sampling: balanced, but no pixel of the split is labelled")

    def order(self, *, seed: int, epoch: int) -> list[int]:
        """The epoch's images, as many as there are in the split."""
        rng = np.random.default_rng((seed, epoch, _ORDER))
        occurring = sorted(self.images)
        queues: dict[int, list[int]] = {k: [] for k in occurring}
        drawn = []
        for place in rng.integers(len(occurring), size=self.length).tolist():
            k = occurring[place]
            if not queues[k]:
                queues[k] = rng.permutation(self.images[k]).tolist()
            drawn.append(queues[k].pop())
        return drawn


def class_balance(
    dataset: SegmentationDataset,
    run: Run,
    accelerator: Accelerator,
    *,
    workers: int = 0,
    progress: bool = False,
) -> ClassBalance:
    """The order of a run's images; the classes in them are read once and kept in the run.

    Args:
        dataset: the train split.
        run: the run's directory, which exists.
        accelerator: gives the processes.
        workers: loader processes.
        progress: show how far it is.

    Raises:
        ValueError: see `classes_in_images` and `ClassBalance`.
    """
    names = describe_split(dataset)["names"]
    kept: list[Any] = [None]
    if accelerator.is_main_process:
        kept = [run.label_classes(names, len(dataset), len(dataset.classes))]
    broadcast_object_list(kept)
    if kept[0] is None:
        kept = [classes_in_images(dataset, accelerator, workers=workers, progress=progress)]
        on_main(accelerator, lambda: run.keep_label_classes(names, kept[0]))
    return ClassBalance(kept[0])


def classes_in_images(
    dataset: SegmentationDataset,
    accelerator: Accelerator,
    *,
    workers: int = 0,
    progress: bool = False,
) -> list[list[int]]:
    """Of each image of a split, the classes that occur in it; read once, shared among ranks.

    Raises:
        ValueError: samples that are other images in each epoch.
    """
    if isinstance(dataset, ClipDataset) and dataset.frames != "all":
        raise ValueError(
            'sampling: "balanced" needs the same samples in each epoch; give '
            "data.train_frames=all, or sampling=shuffle"
        )
    looked = copy.copy(dataset)
    looked.transform = _Presence(len(dataset.classes))
    rank, world_size = accelerator.process_index, accelerator.num_processes
    own: list[list[int]] = []
    batches = evaluation_loader(looked, rank=rank, world_size=world_size, workers=workers)
    total = len(range(rank, len(dataset), world_size))
    with Progress("find classes", unit="image", total=total, show=progress) as shown:
        for groups in batches:
            for batch in groups:
                own += [row.nonzero()[:, 0].tolist() for row in batch["label"]]
                shown.advance(len(batch["label"]))
    pairs: Any = list(zip(range(rank, len(dataset), world_size), own, strict=True))
    gathered = dict(gather_object(pairs)) if world_size > 1 else dict(pairs)
    return [gathered[index] for index in range(len(dataset))]


class _Presence:
    """A transform that replaces the label by which classes occur."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(
        self, image: Tensor, label: Tensor, *, epoch: int, index: int
    ) -> tuple[Tensor, Tensor]:
        values = np.unique(label.numpy())
        present = torch.zeros(self.num_classes, dtype=torch.bool)
        present[values[(values >= 0) & (values < self.num_classes)].astype(np.int64)] = True
        return image[..., :1, :1].float(), present
