"""Bilinear upsampling without forming the upsampled map.

Every upsampled pixel is a weighted mean of four low-resolution pixels; these functions give their
positions and weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Taps(NamedTuple):
    """Where bilinear upsampling to (H, W) reads: for every pixel, two rows and two columns.

    ``y`` (2, H) and ``x`` (2, W) are their indices, ``wy`` and ``wx`` their weights. ``corners``
    holds the four positions y * w + x and their weights, each (H, W).
    """

    y: Tensor
    x: Tensor
    wy: Tensor
    wx: Tensor
    corners: list[tuple[Tensor, Tensor]]


def upsampling_taps(
    source: tuple[int, int], size: torch.Size, align_corners: bool, like: Tensor
) -> Taps:
    """Where upsampling from ``source`` to ``size`` reads; weights in the dtype of ``like``."""
    (y, wy), (x, wx) = (
        axis_taps(n, out, align_corners, like.dtype, like.device)
        for n, out in zip(source, size, strict=True)
    )
    corners = [
        (y[i][:, None] * source[1] + x[j], wy[i][:, None] * wx[j]) for i in (0, 1) for j in (0, 1)
    ]
    return Taps(y, x, wy, wx, corners)


def pixels(features: Tensor, labels: Tensor, positions: Tensor, align_corners: bool) -> Tensor:
    """The upsampled features (M, Z) at some of the labels' pixels only.

    Args:
        features: (B, Z, h, w).
        labels: (B, H, W); only their size is used.
        positions: (M,), indices into the flattened labels.
        align_corners: as in ``torch.nn.functional.interpolate``.
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
    """Indices and weights (2, size) along one axis, as ``torch.nn.functional.interpolate`` does."""
    at = torch.arange(size, device=device, dtype=dtype)
    if align_corners:
        at = at * ((source - 1) / max(1, size - 1))
    else:
        at = ((at + 0.5) * (source / size) - 0.5).clamp(min=0)
    first = at.long().clamp(max=source - 1)
    second = (first + 1).clamp(max=source - 1)
    weight = at - first
    return torch.stack([first, second]), torch.stack([1 - weight, weight])
