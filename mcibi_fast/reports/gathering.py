"""What a model gathers, recorded while it runs: the numbers behind Figures 6 and 7."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.data import SegmentationDataset
from mcibi_fast.data.base import renormalised
from mcibi_fast.data.video import ClipDataset
from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.inference.precision import autocast, precision_of
from mcibi_fast.models import Segmentor, VideoSegmentor
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.nn.context import ContextBase, resize
from mcibi_fast.nn.memory import GaussianMemory
from mcibi_fast.progress import track


@dataclass
class Gathering:
    """One pass of a model.

    Attributes:
        output: what the model returned.
        features: R (B, Z, h, w), Eq. 1.
        weight_logits: logits of the W that each stage gathers with, (B, K, h, w); empty without a
            dataset-level context.
        augmented: R_aug (B, C, h, w) for each stage, Eq. 4.
    """

    output: SegmentationOutput
    features: Tensor
    weight_logits: list[Tensor] = field(default_factory=list)
    augmented: list[Tensor] = field(default_factory=list)


def context_of(model: Segmentor) -> ContextBase | None:
    """The model's dataset-level context, or None (a baseline has none)."""
    return model.head.context if model.head.has_memory else None


def gaussian_memory_of(model: Segmentor) -> GaussianMemory | None:
    """The model's memory of Gaussians, or None if it has no memory or another kind."""
    memory = model.memory if model.head.has_memory else None
    return memory if isinstance(memory, GaussianMemory) else None


@torch.no_grad()
def gather(
    model: Segmentor, images: Tensor, labels: Tensor | None = None, *, stages: int = 1
) -> Gathering:
    """Runs the model and keeps R, W and R_aug of each stage, as the model itself computes them.

    In the precision of its training, as an evaluation does; what is kept is then float32.

    Args:
        model: in evaluation mode.
        images: (B, 3, H, W); for a video model also clips (B, h + 1, 3, H, W), of which the last
            frames are recorded.
        labels: (B, H, W), for a model that gathers with the ground truth.
        stages: of iterative inference (section 3.5); a baseline has one.
    """
    truth = (labels,) if model.needs_labels else ()
    context = context_of(model)
    precision = autocast(images.device, precision_of(model, images.device))
    if context is None:
        with precision:
            if images.ndim == 5:  # another video model: R is that of the last frame by itself
                output, R = model(images, *truth), model.pixel_representations(images)
                return Gathering(output, R.float())
            features = model.backbone(images)
            output, R = model.head(features, *truth), model.head.pixel_representations(features)
        return Gathering(output, R.float())
    with (
        precision,
        _recorded(context.fuse, "prepare") as prepared,
        _recorded(context, "attend") as attended,
        _recorded(context.fuse, "forward") as fused,
    ):
        output = model(images, *truth, stages=stages)
    batch = len(images)  # the frames of a video model end with the last ones of each clip
    return Gathering(
        output,
        features=prepared[0][0][0].float(),
        weight_logits=[arguments[1][-batch:].float() for arguments, _ in attended],
        augmented=[result.float() for _, result in fused],
    )


def model_input(model: Segmentor, dataset: SegmentationDataset, index: int) -> Tensor:
    """A sample as a batch for this model: (1, 3, H, W), or a clip for a video model.

    Args:
        model: an image or video model; a video model gets (1, h + 1, 3, H, W) with its own h
            and gap.
        dataset: with the transform of its evaluation; if it has no clips, a video model gets the
            image alone.
        index: of the sample.
    """
    dataset = renormalised(dataset, model.normalisation)
    if not isinstance(model, VideoSegmentor) or not isinstance(dataset, ClipDataset):
        return dataset[index]["image"][None]
    offsets = model.head.offsets
    clips = ClipDataset(
        dataset.source,
        history=len(offsets),
        gap=offsets[-1] if offsets else 1,
        frames=dataset.frames,
        seed=dataset.seed,
        transform=dataset.transform,
    )
    clips = renormalised(clips, (dataset.mean, dataset.std))
    clip = clips[index]
    return torch.cat([clip["past"].flip(0), clip["image"][None]])[None]


@contextmanager
def _recorded(module: nn.Module, method: str) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    """Records the arguments and the result of each call of a method of this module."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    original: Callable[..., Any] = getattr(module, method)

    def recording(*arguments: Any) -> Any:
        result = original(*arguments)
        calls.append((arguments, result))
        return result

    setattr(module, method, recording)
    try:
        yield calls
    finally:
        delattr(module, method)


def weight_of_class(
    weight_logits: Tensor, k: int, size: tuple[int, int], *, align_corners: bool = False
) -> Tensor:
    """W of one class at full resolution.

    Args:
        weight_logits: (K, h, w); only class k is upsampled (bilinearly).
        k: the class.
        size: (H, W).
        align_corners: of the upsampling, the model's own.

    Returns:
        (H, W) in [0, 1].
    """
    W = weight_logits.softmax(dim=0)[k]
    return resize(W[None, None], torch.Size(size), align_corners)[0, 0]


def weight_of_truth(weight_logits: Tensor, label: Tensor, *, align_corners: bool = False) -> Tensor:
    """W of the right class at every pixel (Figure 7).

    Args:
        weight_logits: (K, h, w).
        label: (H, W), any integer dtype.
        align_corners: of the upsampling, the model's own.

    Returns:
        (H, W) in [0, 1]; NaN where the label is not a class.
    """
    label = label.to(weight_logits.device)
    size = (label.shape[0], label.shape[1])
    weights = torch.full(size, float("nan"), device=label.device)
    # One class at a time, so that K maps of full size are never in memory at once.
    for k in label.unique().tolist():
        if 0 <= k < len(weight_logits):
            here = label == k
            W_k = weight_of_class(weight_logits, k, size, align_corners=align_corners)
            weights[here] = W_k.float()[here]
    return weights


def class_vectors(
    features: Tensor,
    label: Tensor,
    num_classes: int,
    *,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor]:
    """The mean of the features under each class's mask in one image (Figure 6).

    The mean of the bilinearly upsampled features over the mask's pixels at full resolution,
    computed without upsampling them.

    Args:
        features: R or R_aug, (1, Z, h, w).
        label: (H, W), any integer dtype.
        num_classes: K.
        ignore_index: label of the pixels that do not count.
        align_corners: of the upsampling, the model's own.

    Returns:
        The n classes that are present, (n,) int64 in ascending order, and their vectors (n, Z).
    """
    sums, counts = ops.class_feature_sums(
        features,
        label[None].to(features.device),
        num_classes,
        ignore_index=ignore_index,
        align_corners=align_corners,
    )
    classes = counts.nonzero().flatten()
    return classes, sums[classes] / counts[classes, None]


@dataclass(frozen=True)
class Collection:
    """Per-image class vectors over several images.

    Attributes:
        classes: the class of each of the n vectors (n,) int64.
        R: (n, Z) float32.
        R_aug: (n, C) float32, after the first stage's context; None for a baseline.
        C_dl: the dataset-level class representations (K, Z), Eq. 11; None without a
            `GaussianMemory`.
    """

    classes: NDArray[np.int64]
    R: NDArray[np.float32]
    R_aug: NDArray[np.float32] | None
    C_dl: NDArray[np.float32] | None


@torch.no_grad()
def collect(
    model: Segmentor,
    dataset: SegmentationDataset,
    indices: Sequence[int],
    *,
    progress: bool = False,
) -> Collection:
    """The class vectors of these samples, in the order of ``indices``.

    Args:
        model: in evaluation mode.
        dataset: with the transform of its evaluation.
        indices: of the samples.
        progress: show how far it is.
    """
    device = next(model.parameters()).device
    classes: list[Tensor] = []
    vectors: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index in track(indices, "features", unit="image", show=progress):
        image, label = model_input(model, dataset, index).to(device), dataset[index]["label"]
        seen = gather(model, image, label[None])
        for i, features in enumerate((seen.features, *seen.augmented[:1])):
            present, means = class_vectors(
                features,
                label,
                dataset.num_classes,
                ignore_index=dataset.ignore_index,
                align_corners=model.head.align_corners,
            )
            vectors[i].append(means.float().cpu())
        classes.append(present.cpu())
    memory = gaussian_memory_of(model)
    return Collection(
        torch.cat(classes).numpy(),
        torch.cat(vectors[0]).numpy(),
        torch.cat(vectors[1]).numpy() if vectors[1] else None,
        None if memory is None else memory.representations().float().cpu().numpy(),
    )
