"""A small dataset in a folder, for the tests of the options that map its labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def write_folder(root: Path, mask: NDArray[np.uint8], picture: NDArray[np.uint8]) -> Path:
    """Two images of each split, all with this mask and these grey values; returns ``root``."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for name in "ab":
            Image.fromarray(mask).save(root / f"labels/{split}/{name}.png")
            Image.fromarray(picture).convert("RGB").save(root / f"images/{split}/{name}.jpg")
    return root
