"""Maps as rows of pixels, and back."""

from __future__ import annotations

from torch import Tensor


def rows(features: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h*w, C), a view of contiguous and of channels_last maps alike."""
    return features.flatten(2).transpose(1, 2)


def to_map(pixels: Tensor, like: Tensor) -> Tensor:
    """(B, h*w, C) -> (B, C, h, w) with the height and width of ``like``."""
    return pixels.transpose(1, 2).unflatten(2, like.shape[2:])


def standard_rows(table: Tensor) -> Tensor:
    """Mean 0 and deviation 1 (K, 2) for each row of a table (K, Z), on its device.

    A sample is mean + deviation * noise, so that with these it is the noise itself.
    """
    unit = table.new_zeros(len(table), 2)
    unit[:, 1] = 1
    return unit
