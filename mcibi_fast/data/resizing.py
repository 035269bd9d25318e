"""Resizing: images bilinear with antialiasing, labels by the nearest pixel centre; also a window of
the result alone, without computing the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Window = tuple[slice, slice]
"""Rows and columns, both with a start and a stop."""

# Pillow can resize into a window, but for each of its pixels it takes about three times as long as
# PyTorch, which resizes the whole.
_PILLOW_PIXELS = 3


def resize_image(image: Tensor, size: Sequence[int]) -> Tensor:
    """The image (..., H, W) uint8 resized to (height, width): bilinear, with antialiasing.

    It is fastest if the three colours of a pixel are next to each other in memory.
    """
    from mcibi_fast.data.images import torchvision_functional

    resize = torchvision_functional().resize
    if size[1] > 1:
        return resize(image, list(size), antialias=True)
    # To a width of 1, PyTorch's kernel for uint8 fails or gives wrong numbers.
    resized = resize(image.float(), list(size), antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def resize_image_window(image: Tensor, size: Sequence[int], window: Window) -> Tensor:
    """``resize_image(image, size)[..., *window]``, up to rounding, for (..., 3, H, W) uint8."""
    rows, columns = window
    if list(size) == list(image.shape[-2:]):
        return image[..., rows, columns]
    pixels = (rows.stop - rows.start) * (columns.stop - columns.start)
    if size[0] * size[1] <= _PILLOW_PIXELS * pixels:
        return resize_image(image, size)[..., rows, columns]
    if image.ndim > 3:
        return torch.stack([resize_image_window(part, size, window) for part in image])
    return _resize_by_pillow(image, size, window)


def _resize_by_pillow(image: Tensor, size: Sequence[int], window: Window) -> Tensor:
    """(3, H, W) uint8 -> the window, of which only the surroundings are read."""
    read, box = [], []
    for part, old, new in zip(window, image.shape[1:], size, strict=True):
        scale = old / new
        reach = max(scale, 1.0) + 1  # of the filter, and a pixel for rounding
        first = max(0, math.floor(part.start * scale - reach))
        last = min(old, math.ceil(part.stop * scale + reach))
        read.append(slice(first, last))
        box.append((part.start * scale - first, min(part.stop * scale, old) - first))
    pixels = np.ascontiguousarray(image[:, read[0], read[1]].movedim(0, -1).numpy())
    (top, bottom), (left, right) = box
    height, width = (part.stop - part.start for part in window)
    picture = Image.fromarray(pixels).resize(
        (width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
    )
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)


def resize_label_window(label: Tensor, size: Sequence[int], window: Window) -> Tensor:
    """A window of the label (H, W) resized to ``size``: each pixel takes the nearest one's class.

    (``nearest-exact`` of PyTorch; its ``nearest`` shifts by half a pixel.)
    """
    if list(size) == list(label.shape):
        return label[window]
    rows, columns = (
        _nearest(old, new)[part] for old, new, part in zip(label.shape, size, window, strict=True)
    )
    return torch.from_numpy(label.numpy().take(rows, axis=0).take(columns, axis=1))


def _nearest(old: int, new: int) -> NDArray[np.int64]:
    """The source of each pixel, rounded as in PyTorch."""
    centres = (np.arange(new) + 0.5) * float(np.float32(old) / np.float32(new))
    return np.minimum(centres.astype(np.float32).astype(np.int64), old - 1)
