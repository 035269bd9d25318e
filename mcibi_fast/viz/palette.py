"""Colours for classes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def distinct_palette(num_classes: int) -> NDArray[np.uint8]:
    """Colours that are easy to tell apart, (K, 3) uint8, the same on every call.

    Each colour is the one farthest from those before it in the perceptual colour space OKLab
    (https://bottosson.github.io/posts/oklab), so a longer palette begins with the shorter one.
    Raises ValueError for more than 1000 classes.
    """
    if not 0 <= num_classes <= 1000:
        raise ValueError(f"num_classes: {num_classes} colours, at most 1000")
    return _farthest_points(max(num_classes, 32))[:num_classes].copy()


def voc_palette(num_classes: int) -> NDArray[np.uint8]:
    """The PASCAL VOC colours, (K, 3) uint8: the index's bits are spread over RGB; 0 is black."""
    index = np.arange(num_classes)
    colours = np.zeros((num_classes, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            value = (index >> (3 * bit + channel)) & 1
            colours[:, channel] |= (value << (7 - bit)).astype(np.uint8)
    return colours


@lru_cache(maxsize=8)
def _farthest_points(count: int) -> NDArray[np.uint8]:
    levels = np.linspace(24, 248, 15).round()
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = _oklab(rgb / 255)
    # Colours that are almost black, almost white or very bright are hard to look at in overlays.
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    calm = (lab[:, 0] > 0.35) & (lab[:, 0] < 0.93) & (chroma < 0.22)
    rgb, lab = rgb[calm], lab[calm] * (0.8, 1.0, 1.0)
    first = int(np.argmax(-lab[:, 2].round(6)))  # the bluest
    chosen = [first]
    distance = np.linalg.norm(lab - lab[first], axis=1)
    while len(chosen) < count:
        # Rounded, so that ties break the same way on every machine.
        chosen.append(int(np.argmax(distance.round(6))))
        np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1), out=distance)
    return rgb[chosen].astype(np.uint8)


def _oklab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB in 0..1, (N, 3) -> OKLab (N, 3)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_lms = np.array(
        [[0.4122214708, 0.5363325363, 0.0514459929],
         [0.2119034982, 0.6806995451, 0.1073969566],
         [0.0883024619, 0.2817188376, 0.6299787005]]
    )  # fmt: skip
    to_lab = np.array(
        [[0.2104542553, 0.7936177850, -0.0040720468],
         [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]]
    )  # fmt: skip
    return np.cbrt(linear @ to_lms.T) @ to_lab.T
