"""Initialises the memory from pixels of the train split (sections 3.2 and 4.2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mcibi_fast.data import SegmentationDataset
from mcibi_fast.data.loading import training_loader
from mcibi_fast.models import Segmentor
from mcibi_fast.nn.class_memory import ClassMemory
from mcibi_fast.nn.clustering import PixelSample
from mcibi_fast.nn.mode import in_mode
from mcibi_fast.progress import track

CLUSTERED_IMAGES = 1000  # the part of the train split that clusters are made of


@torch.no_grad()
def initialize_memory(
    model: Segmentor,
    dataset: SegmentationDataset,
    accelerator: Accelerator,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    progress: bool = False,
) -> None:
    """Initialises the memory of every class in the train split, if its ``init`` asks for that.

    Does nothing for a model without a memory, or if the memory's ``init`` is "standard". Otherwise
    it goes over the train split, augmented as in its first epoch, until every class has been seen;
    classes that never occur keep their values. With "cluster" it takes pixels from the first
    `CLUSTERED_IMAGES` images (or fewer, once it has 512 of every class) and then only from images
    with classes that were not seen before; meanwhile it holds K x 512 x Z numbers on the CPU. The
    features are those that training will see: batch norms use batch statistics, and their running
    statistics do not change. Every rank goes over the same images, so the result does not depend on
    the number of ranks.

    Args:
        model: without its DistributedDataParallel wrapper.
        dataset: the train split.
        accelerator: gives the device, mixed precision and rank.
        batch_size: images per pass.
        seed: seed of the order of images, as in training.
        workers: loader processes.
        progress: show how far it is.
    """
    if not model.head.has_memory:
        return
    memory = model.memory
    if memory.init == "standard" or bool(memory.met.all()):
        return
    batches = training_loader(
        dataset,
        batch_size=batch_size,
        seed=seed,
        epoch=0,
        drop_last=False,
        workers=workers,
    )
    draw = _Clusters(memory) if memory.init == "cluster" else _Pixels(memory)
    total = -(-len(dataset) // batch_size)
    with _training_statistics(model):
        for batch in track(batches, "initialise memory", unit="batch", total=total, show=progress):
            present = torch.unique(batch["label"].long())
            present = present[(present >= 0) & (present < memory.num_classes)]
            if draw.wants(present[present != memory.ignore_index]):
                with accelerator.autocast():
                    R = model.pixel_representations(batch["image"].to(accelerator.device))
                draw.take(R, batch["label"].to(accelerator.device))
            if draw.done(len(batch["label"])):
                break
    draw.finish()


class _Pixels:
    """One pixel for each representation (each Gaussian) that the memory holds."""

    def __init__(self, memory: ClassMemory) -> None:
        self.memory = memory

    def wants(self, present: Tensor) -> bool:
        """Whether the classes in a batch are of use."""
        return not bool(self.memory.met.cpu()[present].all())

    def take(self, features: Tensor, labels: Tensor) -> None:
        """Takes what is wanted from a batch."""
        self.memory.initialize(features, labels)

    def done(self, images: int) -> bool:
        """Counts a batch of this many images; returns whether it was the last one needed."""
        return bool(self.memory.met.all())

    def finish(self) -> None:
        """Sets the memory from what was taken."""


class _Clusters(_Pixels):
    """Pixels of each class, of which the memory holds the clusters' centres."""

    def __init__(self, memory: ClassMemory) -> None:
        super().__init__(memory)
        self.images = 0
        self.sample = PixelSample(
            memory.num_classes,
            memory.channels,
            seed=memory.seed,
            ignore_index=memory.ignore_index,
            align_corners=memory.align_corners,
        )

    def wants(self, present: Tensor) -> bool:
        enough = self.sample.per_class if self.images < CLUSTERED_IMAGES else 1
        return any(self.sample.counts[k] < enough for k in present.tolist())

    def take(self, features: Tensor, labels: Tensor) -> None:
        self.sample.add(features, labels)

    def done(self, images: int) -> bool:
        self.images += images
        return not self.wants(torch.arange(self.memory.num_classes))

    def finish(self) -> None:
        self.memory.initialize_from(self.sample.centres(self.memory.per_class))


@contextmanager
def _training_statistics(model: nn.Module) -> Iterator[None]:
    """Training mode in which the running statistics of the batch norms do not change."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [
        {name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)}
        for norm in norms
    ]
    try:
        with in_mode(model, training=True):
            yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)
