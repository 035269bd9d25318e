"""Gradient accumulation: a process's share of a batch, taken in several passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mcibi_fast.nn.losses import PixelLoss


def check_batch_size(batch_size: int, accumulate: int, processes: int, samples: int) -> None:
    """Raises ValueError unless there is one whole batch, and it can be dealt out evenly."""
    if samples < batch_size:
        raise ValueError(f"batch_size: {batch_size} is more than the {samples} training samples")
    if batch_size % (accumulate * processes):
        raise ValueError(
            f"batch_size: {batch_size} is not a multiple of accumulate={accumulate} times "
            f"{processes} processes"
        )


def accumulate_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batch: dict[str, Any],
    *,
    parts: int,
    loss: PixelLoss,
    ignore_index: int,
    attack: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Computes a batch's gradient in several passes, up to rounding the same for any ``parts``.

    What depends on the whole batch differs, however: batch norms take their statistics from each
    part, and the memory is updated, and fresh noise drawn, once per part. Each process averages
    over its own valid pixels, and the gradients of the processes are averaged.

    Args:
        accelerator: runs the backward pass and knows the processes.
        model: the model that ``accelerator.prepare`` returned.
        batch, parts, loss, ignore_index: see :func:`micro_batches`.
        attack: computes, from images and labels, the images to train on instead.

    Returns:
        The terms of the batch's loss.
    """
    losses: dict[str, Tensor] = {}
    passes = micro_batches(batch, parts, loss, ignore_index=ignore_index, device=accelerator.device)
    for i, (images, labels, share) in enumerate(passes):
        if attack is not None:
            images = attack(images, labels)
        # The processes exchange their gradients after the last pass only.
        with nullcontext() if i == parts - 1 else accelerator.no_sync(model):
            terms = model(images, labels).losses
            if share is not None:
                terms = {name: share * term for name, term in terms.items()}
            accelerator.backward(torch.stack(list(terms.values())).sum())
        for name, term in terms.items():
            losses[name] = losses[name] + term.detach() if name in losses else term.detach()
    return losses


def micro_batches(
    batch: dict[str, Any], parts: int, loss: PixelLoss, *, ignore_index: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Images, labels and the share of the loss, of each of ``parts`` equal parts of a batch.

    The loss of a batch is a mean over its valid pixels (with class weights over their weights), so
    a part's share is its part of these. The shares sum to 1 and the sum of the weighted losses is
    the whole batch's loss, not the mean over parts. With hard example mining, which chooses among
    each part's pixels, the share is still that of the valid pixels.

    Args:
        batch: ``image`` (B, 3, H, W) and ``label`` (B, H, W) on the host.
        parts: a divisor of B.
        loss: says what its mean divides by.
        ignore_index: label of pixels that do not count.
        device: where the results are; images are moved one part at a time.
    """
    labels = batch["label"].to(device, non_blocking=True).chunk(parts)
    shares: list[Tensor] | list[None] = [None]
    if parts > 1:
        weights = [loss.total_weight(part, ignore_index=ignore_index) for part in labels]
        total = torch.stack(weights)
        shares = list(total / total.sum().clamp(min=torch.finfo(total.dtype).tiny))
    for image, label, share in zip(batch["image"].chunk(parts), labels, shares, strict=True):
        clips = image.ndim > 4  # with past frames
        layout = torch.preserve_format if clips else torch.channels_last
        yield image.to(device, non_blocking=True, memory_format=layout), label, share
