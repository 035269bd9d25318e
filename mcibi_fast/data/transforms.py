"""Training and evaluation transforms.

Every random number comes from a NumPy generator seeded by (seed, epoch, sample index): augmentation
is the same for any number of workers, and the global generators are not used.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mcibi_fast.data.base import IGNORE_INDEX, SegmentationDataset, normalise, normalise_in_place
from mcibi_fast.data.distortion import distort, draw_distortion
from mcibi_fast.data.images import torchvision_functional
from mcibi_fast.data.released import released_normalise, released_resize, released_sides
from mcibi_fast.data.resizing import (
    Window,
    resize_image,
    resize_image_window,
    resize_label_window,
)
from mcibi_fast.data.style import StyleMixing
from mcibi_fast.protocols import TestProtocol, check_test_protocol

_CROP_TRIES = 10


class TrainTransform:
    """Random scale, crop, style, flip, photometric distortion, rotation, normalisation, padding.

    Args:
        crop_size: (height, width) of what comes out, or one side; smaller images are padded at the
            right and the bottom, colours with 0 (the mean) and labels with ``ignore_index``.
        mean, std: the dataset's, three each, for colours in 0..1.
        seed: of the augmentation.
        scale: the range the scale is drawn from, uniformly. It multiplies the size that the next
            three arguments give; without them the image's own.
        size, short_side, long_side: see `EvalTransform`.
        max_class_share: a crop in which one class has more than this share of the labelled pixels
            is drawn again, up to 10 times; the last draw is taken as it is.
        flip_pairs: pairs of classes that the horizontal flip swaps.
        rotation: largest angle in degrees, in either direction, about the crop's centre; corners
            that come into view are filled like padding. 0 never rotates.
        rotation_probability: probability of a rotation.
        style: gives crops another image's style; None keeps their own.

    Called with an image (3, H, W) uint8 and a label (H, W), and keywords ``epoch`` and ``index``;
    returns float32 (3, h, w) and the label (h, w) in its dtype. A clip (T, 3, H, W) gives
    (T, 3, h, w): one draw for all its frames, and each frame gets the result that it would get
    alone. Raises ImportError if torchvision cannot be imported.
    """

    def __init__(
        self,
        crop_size: int | tuple[int, int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        scale: tuple[float, float] = (0.5, 2.0),
        size: tuple[int, int] | None = None,
        short_side: int | None = None,
        long_side: int | None = None,
        max_class_share: float = 0.75,
        flip_pairs: Sequence[tuple[int, int]] = (),
        rotation: float = 0.0,
        rotation_probability: float = 0.5,
        ignore_index: int = IGNORE_INDEX,
        style: StyleMixing | None = None,
    ) -> None:
        torchvision_functional()
        _check_size(size, short_side, long_side)
        self.crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        self.mean, self.std, self.seed = tuple(mean), tuple(std), seed
        self.scale, self.max_class_share = scale, max_class_share
        self.size, self.short_side, self.long_side = size, short_side, long_side
        self.flip_pairs = tuple(flip_pairs)
        self.rotation, self.rotation_probability = rotation, rotation_probability
        self.ignore_index, self.style = ignore_index, style
        if min(self.crop_size) < 1:
            raise ValueError(f"crop_size: {self.crop_size} is not positive")
        if seed < 0:
            raise ValueError(f"seed: {seed} is negative")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale: {scale} is not a range of positive factors")
        if not 0 <= rotation <= 180:
            raise ValueError(f"rotation: {rotation} is no angle from 0 to 180 degrees")
        if not 0 <= rotation_probability <= 1:
            raise ValueError(f"rotation_probability: {rotation_probability} is not in 0..1")

    def __call__(
        self, image: Tensor, label: Tensor, *, epoch: int, index: int
    ) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, epoch, index))
        factor = rng.uniform(*self.scale)
        sides = _resized(label.shape, self.size, self.short_side, self.long_side)
        size = _scaled(sides, factor)
        window, label = self._crop(rng, label, size)
        image = resize_image_window(image, size, window)
        if self.style is not None:
            image = self.style(image, epoch=epoch, index=index)
        is_flipped = rng.random() < 0.5
        if is_flipped:
            label = swap_classes(label.flip(-1), self.flip_pairs)
        padded, crop = self._padded(image)
        crop.numpy()[...] = image.numpy()[..., :: -1 if is_flipped else 1]
        distortion = draw_distortion(rng)
        for frame in crop if crop.ndim > 3 else crop[None]:
            distort(frame, distortion)
        normalise_in_place(crop, self.mean, self.std)
        if self.rotation > 0:
            rotated, label = self._rotate(rng, crop, label)
            crop.copy_(rotated)
        return padded, self._padded_label(label)

    def _crop(
        self, rng: np.random.Generator, label: Tensor, size: Sequence[int]
    ) -> tuple[Window, Tensor]:
        """The window of the image resized to ``size``, and the label there."""
        height, width = (min(c, s) for c, s in zip(self.crop_size, size, strict=True))
        for _ in range(_CROP_TRIES):
            top = int(rng.integers(size[0] - height + 1))
            left = int(rng.integers(size[1] - width + 1))
            window = slice(top, top + height), slice(left, left + width)
            crop = resize_label_window(label, size, window)
            if largest_share(crop, self.ignore_index) <= self.max_class_share:
                break
        return window, crop

    def _rotate(
        self, rng: np.random.Generator, image: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        if rng.random() >= self.rotation_probability:
            return image, label
        angle = rng.uniform(-self.rotation, self.rotation)
        tv = torchvision_functional()
        bilinear, nearest = tv.InterpolationMode.BILINEAR, tv.InterpolationMode.NEAREST
        return (
            tv.rotate(image, angle, interpolation=bilinear, fill=0.0),
            tv.rotate(label[None], angle, interpolation=nearest, fill=self.ignore_index)[0],
        )

    def _padded(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """An image of the crop's size for the result, and the view of it that is not padding."""
        height, width = image.shape[-2:]
        padded = torch.empty(*image.shape[:-2], *self.crop_size)
        padded[..., height:, :] = 0.0
        padded[..., width:] = 0.0
        return padded, padded[..., :height, :width]

    def _padded_label(self, label: Tensor) -> Tensor:
        padded = label.new_full(self.crop_size, self.ignore_index)
        padded[: label.shape[0], : label.shape[1]] = label
        return padded


class EvalTransform:
    """Normalisation, after an optional resize of the image.

    Args:
        mean, std: the dataset's, three each, for colours in 0..1.
        short_side: resize so that the shorter side has this length; None keeps the size.
        long_side: and the longer side at most this one.
        size: resize to this (height, width), whatever the image's proportions.
        protocol: "own": what becomes smaller is filtered (antialiasing). "released": the bytes that
            the released code gets from OpenCV, which does not filter, and its rounding.

    The label keeps its own size, whatever the image's: predictions are resized to it. Any size is
    allowed, so images of different sizes are evaluated one per batch.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        short_side: int | None = None,
        long_side: int | None = None,
        size: tuple[int, int] | None = None,
        protocol: TestProtocol = "own",
    ) -> None:
        _check_size(size, short_side, long_side)
        check_test_protocol(protocol)
        if short_side is not None or size is not None:
            torchvision_functional()
        self.mean, self.std = tuple(mean), tuple(std)
        self.size, self.short_side, self.long_side = size, short_side, long_side
        self.protocol = protocol

    def __call__(
        self, image: Tensor, label: Tensor, *, epoch: int = 0, index: int = 0
    ) -> tuple[Tensor, Tensor]:
        return self.normalised(self.resized(image)), label

    def resized(self, image: Tensor) -> Tensor:
        """The image (..., 3, H, W) uint8 before it is normalised."""
        released = self.protocol == "released"
        sides_of, resize = (
            (released_sides, released_resize) if released else (_resized, resize_image)
        )
        sides = sides_of(image.shape[-2:], self.size, self.short_side, self.long_side)
        if sides == list(image.shape[-2:]):
            return image
        return resize(image.contiguous() if released else image, sides)

    def normalised(self, image: Tensor) -> Tensor:
        """The image (..., 3, H, W) uint8, or a part of it, as float32."""
        if self.protocol == "released":
            return released_normalise(image, self.mean, self.std)
        return normalise(image, self.mean, self.std)

    def under(self, protocol: TestProtocol) -> EvalTransform:
        """The transform for the same test size under a protocol."""
        changed = copy.copy(self)
        changed.protocol = protocol
        return changed


_Dataset = TypeVar("_Dataset", bound=SegmentationDataset)


def under_protocol(dataset: _Dataset, protocol: TestProtocol) -> _Dataset:
    """The dataset with its images prepared as a test protocol does it; it stays as it is.

    A transform other than an `EvalTransform` keeps what it does.
    """
    transform = dataset.transform
    if transform is None and protocol == "released":
        transform = EvalTransform(mean=dataset.mean, std=dataset.std)
    if not isinstance(transform, EvalTransform) or transform.protocol == protocol:
        return dataset
    changed = copy.copy(dataset)
    changed.transform = transform.under(protocol)
    return changed


def largest_share(label: Tensor, ignore_index: int = IGNORE_INDEX) -> float:
    """The share of the commonest class among labelled pixels; 1 when no pixel is labelled."""
    if label.dtype == torch.uint8:
        counts = torch.bincount(label.reshape(-1), minlength=256).numpy()
        counts[ignore_index : ignore_index + 1] = 0
    else:
        counts = np.bincount(label[label != ignore_index].numpy().ravel(), minlength=1)
    total = counts.sum()
    return float(counts.max() / total) if total else 1.0


def swap_classes(label: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """A copy of the label in which the classes of each pair have changed places."""
    swapped = label.clone()
    for left, right in pairs:
        swapped[label == left] = right
        swapped[label == right] = left
    return swapped


def _scaled(sides: Sequence[int], factor: float) -> list[int]:
    return [max(round(side * factor), 1) for side in sides]


def _check_size(
    size: tuple[int, int] | None, short_side: int | None, long_side: int | None
) -> None:
    if short_side is None and long_side is not None:
        raise ValueError("long_side: bounds the resize that short_side asks for; give both")
    if size is not None and short_side is not None:
        raise ValueError("size: fixes both sides, so short_side has no meaning; give one of them")
    for name, value in (("size", size), ("short_side", short_side), ("long_side", long_side)):
        if value is not None and min(value if isinstance(value, tuple | list) else (value,)) < 1:
            raise ValueError(f"{name}: {value} is not positive")


def _resized(
    sides: Sequence[int],
    size: tuple[int, int] | None,
    short_side: int | None,
    long_side: int | None,
) -> list[int]:
    if size is not None:
        return list(size)
    if short_side is None:
        return list(sides)
    factor = short_side / min(sides)
    if long_side is not None:
        factor = min(factor, long_side / max(sides))
    return _scaled(sides, factor)
