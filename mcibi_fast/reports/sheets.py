"""What the sheets of pictures share: scenes, mistakes, sizes and legends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mcibi_fast.reports.charts import LONGEST_NAME
from mcibi_fast.terminal import printable
from mcibi_fast.viz.overlay import Pixels, colourise, fit, legend

FONT = 18
_SMALLEST, _LARGEST = 256, 384  # pixels; smaller pictures are enlarged, larger ones reduced
_HIGH_BITS = np.uint8(0xFC)  # a photograph's two low bits are invisible and a third of its file


@dataclass(frozen=True)
class Scene:
    """An image with its labels.

    Attributes:
        name: of the sample.
        pixels: (H, W, 3) uint8.
        label: (H, W), the ground truth.
    """

    name: str
    pixels: Pixels
    label: NDArray[np.integer]


def labelled(label: NDArray[np.integer], num_classes: int) -> NDArray[np.bool_]:
    """Where the label is one of the K classes, (H, W)."""
    return (label >= 0) & (label < num_classes)


def mistaken(
    prediction: NDArray[np.integer], label: NDArray[np.integer], num_classes: int
) -> NDArray[np.bool_]:
    """Where the prediction differs from the label, (H, W); pixels without a label never do."""
    return labelled(label, num_classes) & (prediction != label)


def sized(picture: Pixels, *, smooth: bool) -> Pixels:
    """The picture at the size at which sheets show it; see `fit` for ``smooth``."""
    return fit(picture, min(max(_SMALLEST, picture.shape[1]), _LARGEST), smooth=smooth)


def image_and_truth(scene: Scene, palette: Pixels) -> tuple[list[Pixels], list[str]]:
    """The two pictures with which a row begins, and the notes under them."""
    image = sized(scene.pixels, smooth=True) & _HIGH_BITS
    truth = sized(colourise(scene.label, palette), smooth=False)
    return [image, truth], [printable(scene.name, longest=LONGEST_NAME), ""]


def width_of(rows: Sequence[Sequence[Pixels]]) -> int:
    """Width of a sheet with these rows, in pixels."""
    return max(sum(picture.shape[1] + 6 for picture in row) for row in rows)


def key(
    occurring: set[int],
    classes: Sequence[str],
    palette: Pixels,
    *,
    width: int,
    hatched: bool = False,
) -> Image.Image:
    """The legend of the classes that occur; with ``hatched`` it also explains mistakes."""
    shown = [k for k in sorted(occurring) if 0 <= k < len(classes)]
    names = [printable(classes[k], longest=LONGEST_NAME) for k in shown]
    return legend(names, palette[shown], width=width, mistaken=hatched, font_size=FONT)
