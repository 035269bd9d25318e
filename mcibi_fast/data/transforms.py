"""Training and evaluation transforms, on torchvision's transforms.v2 functions.

Every random number comes from a NumPy generator seeded by (seed, epoch, sample index): augmentation
is the same for any number of workers, and the global generators are not used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mcibi_fast.data.base import IGNORE_INDEX, normalise
from mcibi_fast.data.images import torchvision_functional
from mcibi_fast.data.style import StyleMixing, resize_image

_CROP_TRIES = 10
# The strengths that are usual for photometric distortion: 32/255 of brightness, half the contrast
# and saturation, 18 degrees of hue; each with probability 1/2.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32 / 255, 0.5, 0.5, 18 / 360


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
        image, label = _resize(image, label, _scaled(sides, factor))
        image, label = self._crop(rng, image, label)
        if self.style is not None:
            image = self.style(image, epoch=epoch, index=index)
        if rng.random() < 0.5:
            image, label = image.flip(-1), swap_classes(label.flip(-1), self.flip_pairs)
        image = normalise(_distort(rng, image), self.mean, self.std)
        if self.rotation > 0:
            image, label = self._rotate(rng, image, label)
        return self._pad(image, label)

    def _crop(
        self, rng: np.random.Generator, image: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        height, width = (min(c, s) for c, s in zip(self.crop_size, label.shape, strict=True))
        for _ in range(_CROP_TRIES):
            top = int(rng.integers(label.shape[0] - height + 1))
            left = int(rng.integers(label.shape[1] - width + 1))
            window = (..., slice(top, top + height), slice(left, left + width))
            if largest_share(label[window], self.ignore_index) <= self.max_class_share:
                break
        return image[window], label[window]

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

    def _pad(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        tv = torchvision_functional()
        right = self.crop_size[1] - label.shape[1]
        bottom = self.crop_size[0] - label.shape[0]
        image = tv.pad(image, [0, 0, right, bottom], fill=0.0)
        label = tv.pad(label[None], [0, 0, right, bottom], fill=self.ignore_index)[0]
        return image.contiguous(), label.contiguous()


class EvalTransform:
    """Normalisation, after an optional resize of the image.

    Args:
        mean, std: the dataset's, three each, for colours in 0..1.
        short_side: resize so that the shorter side has this length; None keeps the size.
        long_side: and the longer side at most this one.
        size: resize to this (height, width), whatever the image's proportions.

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
    ) -> None:
        _check_size(size, short_side, long_side)
        if short_side is not None or size is not None:
            torchvision_functional()
        self.mean, self.std = tuple(mean), tuple(std)
        self.size, self.short_side, self.long_side = size, short_side, long_side

    def __call__(
        self, image: Tensor, label: Tensor, *, epoch: int = 0, index: int = 0
    ) -> tuple[Tensor, Tensor]:
        return normalise(self.resized(image), self.mean, self.std), label

    def resized(self, image: Tensor) -> Tensor:
        """The image (..., 3, H, W) uint8 before it is normalised."""
        sides = _resized(image.shape[-2:], self.size, self.short_side, self.long_side)
        if sides == list(image.shape[-2:]):
            return image
        return resize_image(image.contiguous(), sides)


def largest_share(label: Tensor, ignore_index: int = IGNORE_INDEX) -> float:
    """The share of the commonest class among labelled pixels; 1 when no pixel is labelled."""
    counts = np.bincount(label[label != ignore_index].numpy().ravel())
    return float(counts.max() / counts.sum()) if counts.size else 1.0


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


def _resize(image: Tensor, label: Tensor, size: list[int]) -> tuple[Tensor, Tensor]:
    """Bilinear for the image; for the label the nearest pixel centre ("nearest" shifts by half)."""
    tv = torchvision_functional()
    nearest = tv.InterpolationMode.NEAREST_EXACT
    return (
        resize_image(image, size),
        tv.resize(label[None], size, interpolation=nearest)[0],
    )


def _distort(rng: np.random.Generator, image: Tensor) -> Tensor:
    """Changes brightness, contrast, saturation and hue, each or not; contrast first or last."""
    tv = torchvision_functional()
    # All numbers are drawn, whether used or not, so that one decision does not change the others.
    brightness, contrast, saturation, hue, contrast_first = rng.random(5) < 0.5
    brighter = 1 + _BRIGHTNESS * rng.uniform(-1, 1)
    harder = 1 + _CONTRAST * rng.uniform(-1, 1)
    richer = 1 + _SATURATION * rng.uniform(-1, 1)
    turn = _HUE * rng.uniform(-1, 1)
    if brightness:
        image = tv.adjust_brightness(image, brighter)
    if contrast and contrast_first:
        image = _adjust_contrast(image, harder)
    if saturation:
        image = tv.adjust_saturation(image, richer)
    if hue:
        image = tv.adjust_hue(image, turn)
    if contrast and not contrast_first:
        image = _adjust_contrast(image, harder)
    return image


def _adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """As torchvision's, but the mean is a sum of integers: exact for any number of threads."""
    grey = torchvision_functional().rgb_to_grayscale(image)
    total = grey.sum(dim=(-3, -2, -1), keepdim=True, dtype=torch.int64)  # of each frame
    shift = (total.double() / (grey.shape[-2] * grey.shape[-1]) * (1 - factor)).float()
    return (image * factor + shift).clamp(0, 255).to(torch.uint8)
