"""Whole-image evaluation over a split."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mcibi_fast import ops
from mcibi_fast.engine.loading import Batch, evaluation_loader
from mcibi_fast.metrics import ConfusionMatrix

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mcibi_fast.data import SegmentationDataset


def predict_labels(model: nn.Module, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Class indices at full resolution: the argmax of the upsampled logits, which are not formed.

    Args:
        model: returns a `SegmentationOutput`.
        images: (B, 3, H', W'), any size; multiples of the output stride are not needed.
        size: (H, W) of the labels.

    Returns:
        (B, H, W) int64.
    """
    return ops.upsample_argmax(model(images).logits, size)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    *,
    batch_size: int = 1,
    workers: int = 0,
    accelerator: Accelerator | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    interrupted: Callable[[], bool] | None = None,
) -> ConfusionMatrix:
    """The confusion matrix of a model over a split, summed over all ranks.

    Ranks take every n-th sample each, with no padding, so no sample counts twice; the result does
    not depend on their number.

    Args:
        model: without its DistributedDataParallel wrapper (ranks may have unequal shares); put
            into evaluation mode for the time, and back.
        dataset: samples at full size.
        batch_size: images per pass; of these, images of different size go separately.
        workers: loader processes.
        accelerator: of a distributed run, and for its mixed precision.
        device: where there is no accelerator; default where the model is.
        progress: show a bar (on the main process only).
        interrupted: asked after each batch; true ends the evaluation.

    Raises:
        KeyboardInterrupt: ``interrupted`` said so.
        ValueError: the model has other classes than the dataset, or a label is outside them; on
            the CPU naming the sample, on CUDA after the last one.
    """
    confusion = ConfusionMatrix(len(dataset.classes), dataset.ignore_index)
    rank, world_size, autocast = 0, 1, nullcontext
    if accelerator is not None:
        rank, world_size = accelerator.process_index, accelerator.num_processes
        device, autocast = accelerator.device, accelerator.autocast
    device = torch.device(device if device is not None else next(model.parameters()).device)
    batches = evaluation_loader(
        dataset,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        workers=workers,
        pin_memory=device.type == "cuda",
    )
    was_training = model.training
    model.eval()
    try:
        show = progress and rank == 0
        with tqdm(
            total=len(range(rank, len(dataset), world_size)),
            desc="evaluate",
            unit="image",
            leave=False,
            disable=None if show else True,
        ) as bar:
            for groups in batches:
                for batch in groups:
                    with autocast():
                        _count(confusion, model, batch, device)
                    bar.update(len(batch["name"]))
                    if interrupted is not None and interrupted():
                        raise KeyboardInterrupt
    finally:
        model.train(was_training)
    ops.check_labels()
    return confusion.reduce(accelerator)


def _count(
    confusion: ConfusionMatrix, model: nn.Module, batch: Batch, device: torch.device
) -> None:
    label = batch["label"].to(device, non_blocking=True)
    logits = model(batch["image"].to(device, non_blocking=True)).logits
    try:
        counts = ops.upsample_confusion(
            logits, label, confusion.num_classes, ignore_index=confusion.ignore_index
        )
    except ValueError as error:
        raise ValueError(f"{', '.join(batch['name'])}: {error}") from error
    confusion.add(counts)
