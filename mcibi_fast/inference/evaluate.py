"""Evaluation over a split."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from mcibi_fast.data.base import renormalised
from mcibi_fast.data.loading import Batch, evaluation_loader
from mcibi_fast.data.transforms import under_protocol
from mcibi_fast.errors import enough_memory
from mcibi_fast.inference.labels import (
    LESS_MEMORY,
    FlipPairs,
    check_model,
    image_views,
    join_views,
    whole_image_logits,
)
from mcibi_fast.inference.passes import evaluation_pass, place_of
from mcibi_fast.metrics import ConfusionMatrix
from mcibi_fast.models import Segmentor, VideoSegmentor
from mcibi_fast.models.weights import Precision
from mcibi_fast.recipes.parts import InferenceConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mcibi_fast.data import SegmentationDataset

_LESS_MEMORY = f"{LESS_MEMORY}, or fewer at a time (--batch-size; eval_batch_size in training)"


@torch.no_grad()
def evaluate(
    model: Segmentor,
    dataset: SegmentationDataset,
    *,
    inference: InferenceConfig | None = None,
    batch_size: int = 1,
    workers: int = 0,
    accelerator: Accelerator | None = None,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
    progress: bool = False,
    interrupted: Callable[[], bool] | None = None,
) -> ConfusionMatrix:
    """The confusion matrix of a model over a split, summed over all ranks.

    Each of n ranks takes every n-th sample, without padding, so no sample counts twice, and the
    result does not depend on n. A video model on whole videos (`data.video.whole_videos`) processes
    each frame once, as a stream: each rank takes whole videos, and ``batch_size`` has no effect;
    the result is the same as for clips.

    Args:
        model: without its DistributedDataParallel wrapper (ranks may have unequal shares); it is
            in evaluation mode meanwhile and back in its own mode afterwards.
        dataset: samples whose labels are at full size; its ``flip_pairs`` go with mirrored images.
            They are normalised as the model expects (`Segmentor.normalisation`), and resized to
            their test size by the protocol that ``inference`` names.
        inference: the default is one pass over the whole image.
        batch_size: images per pass; of these, images of different size go separately.
        workers: loader processes.
        accelerator: gives the processes of a distributed run, and its mixed precision if it has
            one.
        device: used without an accelerator; by default the model's device.
        precision: "no", "bf16" or "fp16"; by default the accelerator's, or else that of the model's
            training (``model.precision``).
        progress: show how far it is (on the main process only).
        interrupted: asked after each batch; true ends the evaluation.

    Raises:
        KeyboardInterrupt: ``interrupted`` said so.
        ValueError: the model has other classes than the dataset, or a label is outside them (on
            the CPU naming the sample, on CUDA after the last one); or ``inference`` makes no sense,
            or is not for this model.
    """
    inference = inference or InferenceConfig()
    check_model(model, inference)
    dataset = renormalised(dataset, getattr(model, "normalisation", None))
    dataset = under_protocol(dataset, inference.protocol)
    if _is_streamed(model, dataset):
        from mcibi_fast.inference.evaluate_video import evaluate_videos

        return evaluate_videos(
            cast(Any, model),
            cast(Any, dataset),
            inference=inference,
            windows=(),
            workers=workers,
            accelerator=accelerator,
            device=device,
            precision=precision,
            progress=progress,
            interrupted=interrupted,
        ).confusion
    confusion = ConfusionMatrix(len(dataset.classes), dataset.ignore_index)
    place = place_of(model, accelerator, device, precision)
    batches = evaluation_loader(
        dataset,
        batch_size=batch_size,
        rank=place.rank,
        world_size=place.world_size,
        workers=workers,
        pin_memory=place.device.type == "cuda",
    )
    samples = len(range(place.rank, len(dataset), place.world_size))
    with evaluation_pass(
        model, place, total=samples, unit="image", progress=progress, interrupted=interrupted
    ) as done:
        for groups in batches:
            for batch in groups:
                what = f"{', '.join(batch['name'])}: " + "x".join(map(str, batch["image"].shape))
                with enough_memory(what, _LESS_MEMORY), place.autocast():
                    _count(confusion, model, batch, place.device, inference, dataset.flip_pairs)
                done(len(batch["name"]))
    return confusion.reduce(accelerator)


def _is_streamed(model: Segmentor, dataset: SegmentationDataset) -> bool:
    from mcibi_fast.data.video import whole_videos

    return isinstance(model, VideoSegmentor) and whole_videos(dataset)


def _count(
    confusion: ConfusionMatrix,
    model: Segmentor,
    batch: Batch,
    device: torch.device,
    inference: InferenceConfig,
    flip_pairs: FlipPairs,
) -> None:
    label = batch["label"].to(device, non_blocking=True)
    images = batch["image"].to(device, non_blocking=True)
    try:
        if inference.is_single_view:
            counts = model.head.confusion(
                whole_image_logits(model, images, inference, label),
                label,
                confusion.num_classes,
                ignore_index=confusion.ignore_index,
            )
            confusion.add(counts)
        else:
            size = (label.shape[1], label.shape[2])
            views = image_views(model, images, inference, flip_pairs)
            if views[0].num_classes != confusion.num_classes:
                raise ValueError(
                    f"num_classes: is {confusion.num_classes}, but the logits have "
                    f"{views[0].num_classes} classes"
                )
            confusion.update(join_views(model, views, size, inference), label)
    except ValueError as error:
        raise ValueError(f"{', '.join(batch['name'])}: {error}") from error
