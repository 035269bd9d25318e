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
from mcibi_fast.data.released import released_normalise
from mcibi_fast.data.transforms import EvalTransform
from mcibi_fast.nn.bilinear import axis_taps
from mcibi_fast.protocols import TestProtocol


@dataclass(frozen=True)
class Picture:
    """An image that is normalised where the network looks: in float32 it is four times as large.

    Attributes:
        pixels: (3, H, W) uint8, any strides.
        mean, std: of the normalisation.
        device: where the network is.
        protocol: whose arithmetic normalises it.
    """

    pixels: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device
    protocol: TestProtocol = "own"

    def whole(self) -> Tensor:
        """The network's input (1, 3, H, W)."""
        return self.part(slice(None), slice(None))

    def part(self, rows: slice, columns: slice) -> Tensor:
        """Some of its rows and columns."""
        part = self.pixels[:, rows, columns].to(self.device).contiguous()
        by = released_normalise if self.protocol == "released" else normalise
        return by(part, self.mean, self.std)[None]


def network_input(
    pixels: NDArray[np.uint8],
    mean: Sequence[float],
    std: Sequence[float],
    transform: Transform | None,
    device: torch.device,
    protocol: TestProtocol = "own",
) -> Picture | Tensor:
    """What the network gets of an image.

    Args:
        pixels: (H, W, 3).
        mean, std: of the normalisation, without a transform.
        transform: transforms the image; its label may be any.
        device: where the network is.
        protocol: of the test; a transform other than an `EvalTransform` keeps what it does.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if transform is None:
        return Picture(image, mean, std, device, protocol)
    if isinstance(transform, EvalTransform):
        image = transform.under(protocol).resized(image)
        return Picture(image, transform.mean, transform.std, device, protocol)
    image = image.contiguous()
    return transform(image, image[0], epoch=0, index=0)[0][None].to(device)


def input_size(image: Picture | Tensor) -> tuple[int, int]:
    """(height, width) of the network's input."""
    height, width = (image if isinstance(image, Tensor) else image.pixels).shape[-2:]
    return height, width


class Scaling(NamedTuple):
    """How an image is resized to a scale.

    Attributes:
        protocol: "own": sides are rounded half up, and what is sampled spans the whole image.
            "released": sides are rounded down, and samples are 1 / scale apart.
        align_corners: of the model; the released protocol also resizes images by it.
    """

    protocol: TestProtocol
    align_corners: bool


class Parts(NamedTuple):
    """Images (B, 3, H, W) at one scale, of which any part can be had."""

    size: tuple[int, int]
    of: Callable[[slice, slice], Tensor]


def scaled_parts(images: Tensor | Picture, scale: float, rule: Scaling) -> Parts:
    """The images with their sides multiplied by ``scale`` (bilinear), by a rule."""
    if isinstance(images, Picture) and rule.protocol == "released" and scale != 1:
        images = images.whole()
    if isinstance(images, Tensor):
        images = resized(images, scale, rule)
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


def resized(images: Tensor, scale: float, rule: Scaling) -> Tensor:
    """Images (B, 3, H, W) with their sides multiplied by ``scale`` (bilinear)."""
    if scale == 1:
        return images
    height, width = images.shape[2:]
    if rule.protocol == "released":
        if min(height, width) * scale < 1:
            raise ValueError(
                f"inference.scales: {scale:g} leaves nothing of an image of {height}x{width} in "
                "the released protocol, which rounds down"
            )
        return F.interpolate(
            images, scale_factor=scale, mode="bilinear", align_corners=rule.align_corners
        )
    return F.interpolate(
        images, scaled_sides((height, width), scale), mode="bilinear", align_corners=False
    )


def scaled_sides(sides: tuple[int, int], scale: float) -> tuple[int, int]:
    """Both sides multiplied by ``scale``, rounded half up, at least 1."""
    height, width = (max(1, math.floor(side * scale + 0.5)) for side in sides)
    return height, width
