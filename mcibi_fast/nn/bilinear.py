"""Bilinear upsampling without upsampling: which low-resolution pixels a pixel is made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Taps(NamedTuple):
    """Where bilinear upsampling to (H, W) reads: two rows and two columns of every pixel.

    ``y`` (2, H) and ``x`` (2, W) are their indices, ``wy`` and ``wx`` their weights; ``corners``
    the four positions y * w + x with their weights, each (H, W).
    """

    y: Tensor
    x: Tensor
    wy: Tensor
    wx: Tensor
    corners: list[tuple[Tensor, Tensor]]


def upsampling_taps(
    source: tuple[int, int], size: torch.Size, align_corners: bool, like: Tensor
) -> Taps:
    """Of maps of the size ``source`` upsampled to ``size``, in the dtype and device of ``like``."""
    (y, wy), (x, wx) = (
        axis_taps(n, out, align_corners, like.dtype, like.device)
        for n, out in zip(source, size, strict=True)
    )
    corners = [
        (y[i][:, None] * source[1] + x[j], wy[i][:, None] * wx[j]) for i in (0, 1) for j in (0, 1)
    ]
    return Taps(y, x, wy, wx, corners)


def pixels(features: Tensor, labels: Tensor, positions: Tensor, align_corners: bool) -> Tensor:
    """The upsampled features (M, Z) of some of the labels' pixels alone.

    Args:
        features: (B, Z, h, w).
        labels: (B, H, W), for their size.
        positions: (M,), indices into the flattened labels.
        align_corners: of the upsampling.
    """
    height, width = labels.shape[1:]
    image, row, column = (
        positions // (height * width),
        positions // width % height,
        positions % width,
    )
    kind = features.dtype, features.device
    y, wy = (t[:, row] for t in axis_taps(features.shape[2], height, align_corners, *kind))
    x, wx = (t[:, column] for t in axis_taps(features.shape[3], width, align_corners, *kind))
    found = features.new_zeros(len(positions), features.shape[1])
    for i in (0, 1):
        for j in (0, 1):
            found += (wy[i] * wx[j])[:, None] * features[image, :, y[i], x[j]]
    return found


def axis_taps(
    source: int,
    size: int,
    align_corners: bool,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices and weights (2, size) of one axis, those of ``torch.nn.functional.interpolate``."""
    at = torch.arange(size, device=device, dtype=dtype)
    if align_corners:
        at = at * ((source - 1) / max(1, size - 1))
    else:
        at = ((at + 0.5) * (source / size) - 0.5).clamp(min=0)
    first = at.long().clamp(max=source - 1)
    second = (first + 1).clamp(max=source - 1)
    weight = at - first
    return torch.stack([first, second]), torch.stack([1 - weight, weight])
