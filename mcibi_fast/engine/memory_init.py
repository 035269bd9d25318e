"""Section 3.2: the memory starts from one pixel per class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from mcibi_fast.data import SegmentationDataset
from mcibi_fast.engine.loading import training_loader
from mcibi_fast.models import Segmentor


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
    """Gives every class of the train split its first mean and deviation, where that is wanted.

    Does nothing for a model without a memory, or one whose memory starts at (0, 1).  Otherwise it
    goes over the train split, augmented as in its first epoch, until every class was met; classes
    that never occur stay at (0, 1).  Features are those that training will see (batch statistics
    in the batch norms, whose running statistics are left alone).  Every rank goes over the same
    images, so the result does not depend on the number of ranks.

    Args:
        model: without its DistributedDataParallel wrapper.
        dataset: the train split.
        accelerator: for the device, mixed precision and rank.
        batch_size: images per pass.
        seed: of the order, as in training.
        workers: loader processes.
        progress: show a bar.
    """
    memory = getattr(model, "memory", None)
    if memory is None or bool(memory.met.all()):
        return
    batches = training_loader(
        dataset,
        batch_size=batch_size,
        seed=seed,
        epoch=0,
        drop_last=False,
        workers=workers,
    )
    bar = tqdm(batches, desc="initialise memory", leave=False, disable=None if progress else True)
    with _training_statistics(model), bar:
        for batch in bar:
            present = torch.unique(batch["label"].long())
            present = present[(present >= 0) & (present < len(memory.met))]
            if not bool(memory.met.cpu()[present].all()):
                with accelerator.autocast():
                    R = model.pixel_representations(batch["image"].to(accelerator.device))
                memory.initialize(R, batch["label"].to(accelerator.device))
            if bool(memory.met.all()):
                break


@contextmanager
def _training_statistics(model: nn.Module) -> Iterator[None]:
    """Training mode whose batch norms leave no trace in their running statistics."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [
        {name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)}
        for norm in norms
    ]
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        for norm, buffers in zip(norms, before, strict=True):
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)
