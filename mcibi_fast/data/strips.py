"""Pillow's pictures as arrays, a few rows at a time: copies of the whole would fill the memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_STRIP = 2**20  # pixels


def colours(picture: Image.Image) -> NDArray[np.uint8]:
    """The picture in colour: (H, W, 3) uint8. Raises ValueError if it cannot be converted."""
    width, height = picture.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        strip = picture
        if rows < height:
            strip = picture.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(_in_colour(strip))
    return pixels


def _in_colour(picture: Image.Image) -> Image.Image:
    return picture if picture.mode == "RGB" else picture.convert("RGB")
