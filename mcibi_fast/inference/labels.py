"""Test-time inference: scales, mirrored images, sliding windows, stages, and any mix of them.

Each scale, upright and mirrored, is one view; `recipes.InferenceConfig` says which are used, and by
which of two protocols they are combined.

**The own protocol**, which is much like that of other segmentation toolboxes:

- The test image is resized to its test size with antialiasing (`data.EvalTransform`), and then to
  each scale: bilinear, sides rounded half up.
- A mirrored view's logits are mirrored back, left and right classes exchanged (``flip_pairs``).
- The logits of windows are resized to the windows' sizes, summed, and divided by the number of
  windows over each pixel; the result is resized to the labels' size. The logits of a whole image
  are resized to that size directly.
- The label is the argmax of the mean over views of the softmax. With ``softmax="none"`` it is that
  of the mean of the logits. With ``softmax="stride"`` the softmax replaces the logits from the
  start, and everything that follows up to the argmax is linear.
- The last window of a row or column ends with the image. An image smaller than a window is padded
  with 0 (the mean colour) on the right and at the bottom; predictions for the padding are left out.
- Each view and window goes through all stages of iterative inference by itself.

**The released protocol** gives the labels of the released code's own test, with which the published
numbers were made. It differs in this:

- The test image is resized as OpenCV resizes bytes, without antialiasing. The sides of its scales
  are rounded down, and samples are 1 / scale apart.
- Views are averaged as logits. With ``softmax="stride"`` (the released code's
  ``use_probs_before_resize``) the softmax of a whole image is taken at the network's stride, that
  of a window at the window's size.
- There is no padding: windows are at most as large as the image.
- Each stage runs the network again for all views and windows. All of them get the mean of all
  views' results of the stage before, resized to fit: mirrored views get it as it is, not mirrored,
  and each window gets that of the whole image. With ``softmax="stride"`` these are probabilities,
  which the next stage takes for logits.

Logits stay at the network's stride until `views.label_map` computes the result band by band, and a
single view is left to ``ops.upsample_argmax``: a tensor of size K x H x W is never allocated.
Windows are computed when a band needs them, so they need the same memory for images of any size.

One pass over a whole image needs 0.5 to 1 GB for each million pixels. So `windows_for_large` takes
images of more than two windows (``defaults.LARGE_IMAGE``) in windows of 512x512 by 341x341
(``defaults.LARGE_WINDOW``), the crops that networks are usually trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcibi_fast.defaults import LARGE_IMAGE, LARGE_WINDOW
from mcibi_fast.inference.pictures import (
    Parts,
    Picture,
    Scaling,
    mirrored_parts,
    resized,
    scaled_parts,
    scaled_sides,
)
from mcibi_fast.inference.views import View, Window, label_map, map_of
from mcibi_fast.models import SegmentationHead, Segmentor, VideoSegmentor
from mcibi_fast.nn.one_logit import threshold_shift, two_logits
from mcibi_fast.ops.checks import wide
from mcibi_fast.recipes.parts import InferenceConfig

FlipPairs = Sequence[tuple[int, int]]
Forward = Callable[[Tensor], Tensor]  # images to logits

LESS_MEMORY = "take it in windows, or in smaller ones (--window 512,512), or at fewer --scales"
"""What to do about an image that needs too much memory."""


def predict_labels(
    model: Segmentor,
    images: Tensor | Picture,
    size: tuple[int, int],
    inference: InferenceConfig | None = None,
    *,
    flip_pairs: FlipPairs = (),
    labels: Tensor | None = None,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Class indices at full resolution; the upsampled logits are not formed.

    Args:
        model: an image model, or a `SegmentorWrapper` around one.
        images: (B, 3, H', W'), any size; multiples of the output stride are not needed. Or one
            `Picture`, which takes less memory.
        size: (H, W) of the labels.
        inference: the default is one pass over the whole image.
        flip_pairs: classes that a mirrored image swaps, see `SegmentationDataset`.
        labels: (B, H, W), for a model that gathers with the ground truth.
        dtype: of the result.

    Returns:
        (B, H, W).

    Raises:
        ValueError: settings that make no sense, or that the model cannot follow.
    """
    inference = inference or InferenceConfig()
    check_model(model, inference)
    if inference.is_single_view:
        whole = images.whole() if isinstance(images, Picture) else images
        logits = whole_image_logits(model, whole, inference, labels)
        return model.head.class_map(logits, size).to(dtype)
    views = image_views(model, images, inference, flip_pairs)
    return join_views(model, views, size, inference, dtype)


def windows_for_large(
    inference: InferenceConfig, size: tuple[int, int], window: tuple[int, int] = LARGE_WINDOW
) -> InferenceConfig:
    """The settings with windows, if the image is larger than LARGE_IMAGE of them.

    Args:
        inference: settings; those with windows of their own stay.
        size: (height, width) of the image; what counts are its pixels at the largest scale.
        window: (height, width) of the windows, such as the crops that the model was trained on.
    """
    height, width = scaled_sides(size, max(inference.scales))
    small = height * width <= LARGE_IMAGE * window[0] * window[1]
    if inference.window is not None or small:
        return inference
    return replace(inference, window=window)


def check_model(model: Segmentor, inference: InferenceConfig) -> None:
    """Raises ValueError for settings that make no sense, or that the model cannot follow.

    Raises TypeError for a model that is neither a `Segmentor` nor a wrapper around one.
    """
    inference.validate()
    if not isinstance(getattr(model, "head", None), SegmentationHead):
        raise TypeError(
            f"model: expected a Segmentor or a SegmentorWrapper, got "
            f"{type(model).__name__} without a SegmentationHead as its head"
        )
    if inference.stages is not None and not model.head.has_memory:
        raise ValueError(
            f"inference.stages: {type(model.head).__name__} has no memory, so there is no "
            "iterative inference; leave stages out"
        )
    if inference.threshold is not None and model.head.num_classes > 2:
        raise ValueError(
            f"inference.threshold: for two classes, but the model has {model.head.num_classes}"
        )
    if isinstance(model, VideoSegmentor) and _passes(model, inference) > 1:
        raise ValueError(
            "inference.stages: the released protocol runs the network once more for each stage, "
            "which a video model cannot do; give 1 stage, or the own protocol"
        )
    plain = inference.is_single_view and inference.scales == (1.0,)
    if model.needs_labels and not plain:
        raise ValueError(
            "inference: the model gathers with the ground truth, which is possible only in one "
            f"pass over the whole image, not with {inference}"
        )


def whole_image_logits(
    model: Segmentor, images: Tensor, inference: InferenceConfig, labels: Tensor | None = None
) -> Tensor:
    """Logits (B, K, h, w) of the only view (its probabilities with softmax at the stride).

    For arguments see `predict_labels`; ``inference`` was checked (`check_model`).
    """
    (scale,) = inference.scales
    images = resized(images, scale, _scaling(model, inference))
    if model.needs_labels:
        if labels is None:
            raise ValueError(
                "labels: the model gathers with the ground truth and cannot predict without it"
            )
        small = F.interpolate(labels[:, None].double(), images.shape[2:], mode="nearest-exact")
        logits = _forward(model, inference, labels=small[:, 0].to(labels.dtype))(images)
        return _by_threshold(logits, 1, inference)
    logits = _forward(model, inference)(images)
    for _ in range(1, _passes(model, inference)):
        logits = _forward(model, inference, previous_logits=logits)(images)
    return _by_threshold(logits, 1, inference)


def image_views(
    model: Segmentor, images: Tensor | Picture, inference: InferenceConfig, flip_pairs: FlipPairs
) -> list[View]:
    """The logits of every view, at the network's stride, mirrored back; windows' are yet to come.

    For arguments see `predict_labels`; ``inference`` was checked (`check_model`).
    """
    rule = _scaling(model, inference)
    scales = [scaled_parts(images, scale, rule) for scale in inference.scales]
    views = _views(_forward(model, inference), scales, inference, flip_pairs)
    for _ in range(1, _passes(model, inference)):
        forward = _forward(model, inference, previous_logits=_mean(model, views))
        views = _views(forward, scales, inference, flip_pairs)
    if inference.threshold is None or _is_later(views, inference):
        return views
    return [_view_by_threshold(view, inference) for view in views]


def join_views(
    model: Segmentor,
    views: Sequence[View],
    size: tuple[int, int],
    inference: InferenceConfig,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Labels (B, H, W) of `image_views`."""
    return label_map(
        views,
        size,
        align_corners=model.head.align_corners,
        softmax=inference.averages == "labels",
        dtype=dtype,
        threshold=inference.threshold if _is_later(views, inference) else None,
    )


def _is_later(views: Sequence[View], inference: InferenceConfig) -> bool:
    """Whether the threshold is for probabilities that are computed only when views are joined."""
    return inference.averages == "labels" and len(views) > 1


def _by_threshold(values: Tensor, axis: int, inference: InferenceConfig) -> Tensor:
    """Logits or probabilities of two classes, changed so that the largest is by the threshold.

    The change is linear, so resizing and averaging may follow.
    """
    t = inference.threshold
    if t is None:
        return values
    first, second = values.unbind(axis)
    if inference.averages == "stride":  # p_1 > t is (1 - t) p_1 > t p_0, as p_0 + p_1 = 1
        return torch.stack((t * first, (1 - t) * second), axis)
    return torch.stack((first, second + threshold_shift(t)), axis)


def _view_by_threshold(view: View, inference: InferenceConfig) -> View:
    if view.logits is not None:
        return view._replace(logits=_by_threshold(view.logits, -1, inference))

    def changed(window: Window) -> Window:
        def compute() -> Tensor:
            return _by_threshold(window.compute(), -1, inference)

        return Window(compute, window.top, window.left, window.size)

    return view._replace(windows=[changed(window) for window in view.windows])


def _scaling(model: Segmentor, inference: InferenceConfig) -> Scaling:
    return Scaling(inference.protocol, model.head.align_corners)


def _passes(model: Segmentor, inference: InferenceConfig) -> int:
    """How often the network runs: the released protocol runs it for each stage."""
    if inference.protocol == "own" or not model.head.has_memory or model.needs_labels:
        return 1
    return inference.stages or model.head.stages


def _forward(model: Segmentor, inference: InferenceConfig, **options: Tensor) -> Forward:
    """Images, or a window's part of them, to what is averaged.

    ``options`` are the model's, besides the number of stages.
    """
    stages = 1 if model.head.has_memory and inference.protocol == "released" else inference.stages
    given: dict[str, Any] = options if stages is None else options | {"stages": stages}
    at_own_size = inference.protocol == "released" and inference.window is not None

    def forward(images: Tensor) -> Tensor:
        # What follows rounds nothing more, whether or not the model was run by an accelerator.
        logits = model(images, **given).logits
        logits = two_logits(logits.to(wide(logits.dtype)))
        if inference.averages != "stride":
            return logits
        if at_own_size:
            logits = model.head.upsample(logits, images.shape[2:])
        return logits.softmax(1)

    return forward


def _views(
    forward: Forward, scales: Sequence[Parts], inference: InferenceConfig, flip_pairs: FlipPairs
) -> list[View]:
    views = []
    for scaled in scales:
        views.append(_view(forward, scaled, inference))
        if inference.flip:
            mirrored = _view(forward, mirrored_parts(scaled), inference)
            views.append(_mirrored(mirrored, flip_pairs))
    return views


def _mean(model: Segmentor, views: Sequence[View]) -> Tensor:
    """The mean of what the views hold (B, K, h, w), at the size of the last one."""
    maps = [map_of(view, align_corners=model.head.align_corners) for view in views]
    size = maps[-1].shape[2:]
    return torch.stack([model.head.upsample(each, size) for each in maps]).mean(0)


def _view(forward: Forward, images: Parts, inference: InferenceConfig) -> View:
    height, width = images.size
    if inference.window is None:
        return View(images.size, logits=_by_pixel(forward(images.of(slice(None), slice(None)))))
    size = inference.window
    if inference.protocol == "released":
        size = min(size[0], height), min(size[1], width)
    padding = 0, max(0, size[1] - width), 0, max(0, size[0] - height)
    down, right = inference.window_stride

    def compute(top: int, left: int) -> Tensor:
        part = images.of(slice(top, top + size[0]), slice(left, left + size[1]))
        return _by_pixel(forward(F.pad(part, padding)))

    return View(
        images.size,
        [
            Window(partial(compute, top, left), top, left, size)
            for top in _starts(height, size[0], down)
            for left in _starts(width, size[1], right)
        ],
    )


def _starts(length: int, window: int, stride: int) -> Iterator[int]:
    """Where windows start; the last one ends with the image and overlaps more."""
    last = max(0, length - window)
    yield from range(0, last, stride)
    yield last


def _by_pixel(logits: Tensor) -> Tensor:
    return logits.permute(0, 2, 3, 1).contiguous()


def _mirrored(view: View, flip_pairs: FlipPairs) -> View:
    """The view of a mirrored image as one of the image itself."""
    order: list[Tensor] = []  # on the device once: a list would be copied there in every window

    def mirror(logits: Tensor) -> Tensor:
        logits = logits.flip(2)
        if not flip_pairs:
            return logits
        if not order:
            order.append(torch.tensor(_swapped(logits.shape[-1], flip_pairs), device=logits.device))
        return logits.index_select(-1, order[0])

    if view.logits is not None:
        return view._replace(logits=mirror(view.logits))

    def mirrored(window: Window) -> Window:
        left = view.size[1] - window.left - window.size[1]
        return Window(lambda: mirror(window.compute()), window.top, left, window.size)

    return view._replace(windows=[mirrored(window) for window in view.windows])


def _swapped(num_classes: int, flip_pairs: FlipPairs) -> list[int]:
    """The classes in the order that a mirrored image has them in."""
    if any(max(pair) >= num_classes for pair in flip_pairs):
        raise ValueError(
            f"flip_pairs: {tuple(flip_pairs)}, but the model has {num_classes} classes"
        )
    classes = list(range(num_classes))
    for left, right in flip_pairs:
        classes[left], classes[right] = right, left
    return classes
