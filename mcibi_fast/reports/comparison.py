"""Figures 5 and 7: images beside their labels, predictions with their mistakes, and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mcibi_fast.viz.overlay import Pixels, colourise, fit, grid, legend, mark

_SIDE, _LARGEST = 256, 384  # small pictures grow to the one, large ones shrink to the other
_FONT = 18
_LEVELS = 64  # no eye sees the steps, and the file is half as large
_HIGH_BITS = np.uint8(0xFC)  # of a photograph; the two others are invisible and a third of its file
_NO_WEIGHT = (236, 236, 236)


@dataclass(frozen=True)
class Scene:
    """One row.

    Attributes:
        name: of the sample.
        pixels: (H, W, 3) uint8.
        label: (H, W), the ground truth.
    """

    name: str
    pixels: Pixels
    label: NDArray[np.integer]


def prediction_sheet(
    scenes: Sequence[Scene],
    predictions: Mapping[str, Sequence[NDArray[np.integer]]],
    classes: Sequence[str],
    palette: Pixels,
) -> Image.Image:
    """Image, ground truth and each model's prediction, its mistaken pixels hatched (Figure 5).

    Under each prediction stands the share of labelled pixels that it has right.

    Args:
        scenes: one row each.
        predictions: for each model's name (H, W) class indices per scene.
        classes: K names; the legend has those that occur.
        palette: (K, 3) uint8.
    """
    rows, notes = [], []
    occurring: set[int] = set()
    for i, scene in enumerate(scenes):
        row, line = _left(scene, palette)
        occurring.update(np.unique(scene.label).tolist())
        for maps in predictions.values():
            wrong = mistaken(maps[i], scene.label, len(classes))
            labelled = np.isin(scene.label, np.arange(len(classes)))
            occurring.update(np.unique(maps[i]).tolist())
            wrong_there = _sized(wrong.astype(np.uint8), smooth=False) > 0
            row.append(mark(_sized(colourise(maps[i], palette), smooth=False), wrong_there))
            right = 100 * (1 - wrong.sum() / max(labelled.sum(), 1))
            line.append(f"{right:.1f} % right")
        rows.append(row)
        notes.append(line)
    below = key(occurring, classes, palette, width=_width(rows), hatched=True)
    columns = ["image", "ground truth", *predictions]
    title = "Predictions; mistaken pixels are hatched"
    return grid(rows, columns=columns, notes=notes, title=title, footer=[below], font_size=_FONT)


def weight_sheet(
    scenes: Sequence[Scene],
    weights: Mapping[str, Sequence[NDArray[np.floating]]],
    classes: Sequence[str],
    palette: Pixels,
) -> Image.Image:
    """Image, ground truth and the weight of the right class at every pixel (Figure 7).

    Args:
        scenes: one row each.
        weights: for each stage's name (H, W) in [0, 1] per scene, NaN where there is no label.
        classes: K names; the legend has those that occur.
        palette: (K, 3) uint8.
    """
    rows, notes = [], []
    occurring: set[int] = set()
    for i, scene in enumerate(scenes):
        row, line = _left(scene, palette)
        occurring.update(np.unique(scene.label).tolist())
        for maps in weights.values():
            row.append(heat(maps[i]))
            known = maps[i][np.isfinite(maps[i])]
            line.append(f"mean {known.mean():.2f}" if known.size else "no label")
        rows.append(row)
        notes.append(line)
    width = _width(rows)
    footer = [_colour_bar(width), key(occurring, classes, palette, width=width)]
    columns = ["image", "ground truth", *weights]
    title = "How much each pixel gathers from its right class"
    return grid(rows, columns=columns, notes=notes, title=title, footer=footer, font_size=_FONT)


def class_weight_sheet(
    scene: Scene,
    weights: Mapping[str, NDArray[np.floating]],
    palette: Pixels,
    *,
    columns: int = 4,
) -> Image.Image:
    """One image, its ground truth, and the weight of one class after the other at every pixel.

    Args:
        scene: the image.
        weights: for each class's name (H, W) in [0, 1].
        palette: (K, 3) uint8.
        columns: pictures per row.
    """
    left, _ = _left(scene, palette)
    pictures = [*left, *(heat(values) for values in weights.values())]
    notes = [scene.name, "ground truth", *(f"W of {name}" for name in weights)]
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    lines = [notes[i : i + columns] for i in range(0, len(notes), columns)]
    bar = _colour_bar(_width(rows))
    title = "How much each pixel gathers from one class"
    return grid(rows, notes=lines, title=title, footer=[bar], font_size=_FONT)


def heat(weights: NDArray[np.floating]) -> Pixels:
    """Weights (H, W) in [0, 1] in colours from dark (0) to bright (1); pale grey for NaN."""
    known = np.isfinite(weights)
    levels = (np.where(known, weights, 0).clip(0, 1) * (_LEVELS - 1) + 0.5).astype(int)
    colours = _colour_map()[levels]
    picture = np.where(known[..., None], colours, np.array(_NO_WEIGHT, np.uint8))
    return _sized(picture, smooth=True)


def _sized(picture: Pixels, *, smooth: bool) -> Pixels:
    return fit(picture, min(max(_SIDE, picture.shape[1]), _LARGEST), smooth=smooth)


def _left(scene: Scene, palette: Pixels) -> tuple[list[Pixels], list[str]]:
    image = _sized(scene.pixels, smooth=True) & _HIGH_BITS
    truth = _sized(colourise(scene.label, palette), smooth=False)
    return [image, truth], [scene.name, ""]


def mistaken(
    prediction: NDArray[np.integer], label: NDArray[np.integer], num_classes: int
) -> NDArray[np.bool_]:
    """Where a labelled pixel is given to another class."""
    labelled = (label >= 0) & (label < num_classes)
    return labelled & (prediction != label)


def _width(rows: Sequence[Sequence[Pixels]]) -> int:
    return max(sum(picture.shape[1] + 6 for picture in row) for row in rows)


def key(
    occurring: set[int],
    classes: Sequence[str],
    palette: Pixels,
    *,
    width: int,
    hatched: bool = False,
) -> Image.Image:
    """The legend of the classes that occur; ``hatched`` explains mistakes, too."""
    shown = [k for k in sorted(occurring) if 0 <= k < len(classes)]
    names = [classes[k] for k in shown]
    return legend(names, palette[shown], width=width, mistaken=hatched, font_size=_FONT)


def _colour_bar(width: int) -> Image.Image:
    """The colours of weights from 0 to 1, with what they mean."""
    font = ImageFont.load_default(_FONT)
    bar = Image.new("RGB", (width, 2 * _FONT + 8), (255, 255, 255))
    draw = ImageDraw.Draw(bar)
    texts = ("weight W:  0", "1")
    left = int(font.getlength(texts[0])) + 10
    ramp = _colour_map()[None].repeat(_FONT + 4, 0).repeat(4, 1)
    bar.paste(Image.fromarray(ramp), (left, 6))
    draw.text((0, 6), texts[0], fill=(40, 42, 48), font=font)
    draw.text((left + ramp.shape[1] + 8, 6), texts[1], fill=(40, 42, 48), font=font)
    return bar


def _colour_map() -> Pixels:
    """(_LEVELS, 3) uint8."""
    from matplotlib import colormaps

    return (colormaps["inferno"](np.linspace(0, 1, _LEVELS))[:, :3] * 255 + 0.5).astype(np.uint8)
