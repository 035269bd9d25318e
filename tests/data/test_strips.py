from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mcibi_fast.data import strips
from mcibi_fast.viz import blend


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_strips_are_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(256, size=(37, 23, 3)).astype(np.uint8))
    picture = colours.convert("P").convert("PA") if mode == "PA" else colours.convert(mode)
    expected = np.array(picture.convert("RGB"))
    for pixels in (1, 100, 10**6):
        monkeypatch.setattr(strips, "_STRIP", pixels)
        found = strips.colours(picture)
        assert np.array_equal(found, expected) and found.flags.writeable


def test_an_overlay_may_be_drawn_on_its_image() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(700, 500, 3)).astype(np.uint8)
    label = rng.integers(12, size=(700, 500)).astype(np.uint8)
    palette = rng.integers(256, size=(10, 3)).astype(np.uint8)
    mixed = blend(image, label, palette)
    # In float64, rounded half up; classes that are none keep the image.
    colours = np.concatenate([palette, np.zeros((2, 3), np.uint8)])[label]
    expected = (image + 0.55 * (colours.astype(np.float64) - image) + 0.5).astype(np.uint8)
    expected[label >= 10] = image[label >= 10]
    assert np.array_equal(mixed, expected)
    assert blend(image, label, palette, out=image) is image
    assert np.array_equal(image, expected)
