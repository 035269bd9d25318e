"""An image of which the network's input is made part by part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mcibi_fast.data.base import Transform, normalise
from mcibi_fast.data.transforms import EvalTransform
from mcibi_fast.nn.bilinear import axis_taps


@dataclass(frozen=True)
class Picture:
    """An image that is normalised where the network looks: in float32 it is four times as large.

    Attributes:
        pixels: (3, H, W) uint8, any strides.
        mean, std: of the normalisation.
        device: where the network is.
    """

    pixels: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device

    def whole(self) -> Tensor:
        """The network's input (1, 3, H, W)."""
        return self.part(slice(None), slice(None))

    def part(self, rows: slice, columns: slice) -> Tensor:
        """Some of its rows and columns."""
        part = self.pixels[:, rows, columns].to(self.device).contiguous()
        return normalise(part, self.mean, self.std)[None]


def network_input(
    pixels: NDArray[np.uint8],
    mean: Sequence[float],
    std: Sequence[float],
    transform: Transform | None,
    device: torch.device,
) -> Picture | Tensor:
    """What the network gets of an image.

    Args:
        pixels: (H, W, 3).
        mean, std: of the normalisation, without a transform.
        transform: transforms the image; its label may be any.
        device: where the network is.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if transform is None:
        return Picture(image, mean, std, device)
    if isinstance(transform, EvalTransform):
        return Picture(transform.resized(image), transform.mean, transform.std, device)
    image = image.contiguous()
    return transform(image, image[0], epoch=0, index=0)[0][None].to(device)


def input_size(image: Picture | Tensor) -> tuple[int, int]:
    """(height, width) of the network's input."""
    height, width = (image if isinstance(image, Tensor) else image.pixels).shape[-2:]
    return height, width


class Parts(NamedTuple):
    """Images (B, 3, H, W) at one scale, of which any part can be had."""

    size: tuple[int, int]
    of: Callable[[slice, slice], Tensor]


def scaled_parts(images: Tensor | Picture, scale: float) -> Parts:
    """The images with their sides multiplied by ``scale`` and rounded half up (bilinear)."""
    if isinstance(images, Tensor):
        images = resized(images, scale)
        height, width = images.shape[2:]
        return Parts((height, width), lambda rows, columns: images[:, :, rows, columns])
    height, width = images.pixels.shape[1:]
    if scale == 1:
        return Parts((height, width), images.part)
    size = scaled_sides((height, width), scale)
    taps = [
        axis_taps(m, n, False, torch.float32) for m, n in zip((height, width), size, strict=True)
    ]

    def part(rows: slice, columns: slice) -> Tensor:
        (y, wy), (x, wx) = (
            (source[:, where], weight[:, where])
            for (source, weight), where in zip(taps, (rows, columns), strict=True)
        )
        top, left = int(y.min()), int(x.min())
        small = images.part(slice(top, int(y.max()) + 1), slice(left, int(x.max()) + 1))
        y, wy, x, wx = (t.to(small.device) for t in (y - top, wy, x - left, wx))
        small = small[:, :, y[0]] * wy[0][:, None] + small[:, :, y[1]] * wy[1][:, None]
        return small[:, :, :, x[0]] * wx[0] + small[:, :, :, x[1]] * wx[1]

    return Parts(size, part)


def mirrored_parts(parts: Parts) -> Parts:
    """The images mirrored."""
    width = parts.size[1]

    def part(rows: slice, columns: slice) -> Tensor:
        start, stop, _ = columns.indices(width)
        return parts.of(rows, slice(width - stop, width - start)).flip(3)

    return Parts(parts.size, part)


def resized(images: Tensor, scale: float) -> Tensor:
    """Images (B, 3, H, W) with their sides multiplied by ``scale`` (bilinear)."""
    if scale == 1:
        return images
    height, width = images.shape[2:]
    return F.interpolate(
        images, scaled_sides((height, width), scale), mode="bilinear", align_corners=False
    )


def scaled_sides(sides: tuple[int, int], scale: float) -> tuple[int, int]:
    """Both sides multiplied by ``scale``, rounded half up, at least 1."""
    height, width = (max(1, math.floor(side * scale + 0.5)) for side in sides)
    return height, width
