"""The section "What the pixels gather": the weights W as heat maps (Figure 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mcibi_fast.models import Segmentor
from mcibi_fast.reports.charts import LONGEST_NAME
from mcibi_fast.reports.gathering import context_of, gather, weight_of_class, weight_of_truth
from mcibi_fast.reports.page import Report
from mcibi_fast.reports.samples import Samples, Trained
from mcibi_fast.reports.sheets import FONT, Scene, image_and_truth, key, sized, width_of
from mcibi_fast.terminal import printable
from mcibi_fast.viz.overlay import Pixels, grid

_CLASS_MAPS = 10  # at most, of the one image
_LEVELS = 64  # steps too small to see; they halve the file
_NO_WEIGHT = (236, 236, 236)


def add_weights(report: Report, trained: Sequence[Trained], samples: Samples) -> None:
    """Adds the section: where each pixel gathers, for the models that gather."""
    gathering = [each for each in trained if context_of(each.model) is not None]
    if not gathering:
        return
    report.heading("What the pixels gather")
    report.text(
        "Each pixel gathers the classes' dataset-level representations with weights W that sum to "
        "one (Eq. 12). Where a map is bright, the pixel gathers mostly from its own class. In the "
        "second stage of iterative inference (section 3.5) W also follows the first prediction."
    )
    dataset = samples.dataset
    for each in gathering:
        stages = _weights_of_stages(each.model, samples)
        align = each.model.head.align_corners
        names = ("W of the right class, stage 1", "W of the right class, stage 2")
        weights = {
            name: [
                weight_of_truth(logits, label, align_corners=align).cpu().numpy()
                for logits, label in zip(stage, samples.labels, strict=True)
            ]
            for name, stage in zip(names, stages, strict=True)
        }
        report.picture(
            weight_sheet(samples.scenes, weights, dataset.classes, dataset.palette),
            f"{each.name}: the weight of the right class at every pixel, and its mean. As Figure 7 "
            "of the paper.",
            name="weights",
            wide=True,
        )
        _add_class_weights(report, each, stages[0], samples)


def _add_class_weights(
    report: Report, trained: Trained, weight_logits: Sequence[Tensor], samples: Samples
) -> None:
    """Adds W of every class of one image, the one with the most classes."""
    classes = samples.dataset.classes
    present = [
        [k for k in label.unique().tolist() if 0 <= k < len(classes)] for label in samples.labels
    ]
    richest = max(range(len(present)), key=lambda i: len(present[i]))
    H, W = samples.labels[richest].shape
    align = trained.model.head.align_corners
    logits = weight_logits[richest]
    maps = {
        classes[k]: weight_of_class(logits, k, (H, W), align_corners=align).cpu().numpy()
        for k in present[richest][:_CLASS_MAPS]
    }
    report.picture(
        class_weight_sheet(samples.scenes[richest], maps, samples.dataset.palette),
        f"{trained.name}: the weight of each class of one image at every pixel, first stage.",
        name="class_weights",
        wide=True,
    )


def _weights_of_stages(model: Segmentor, samples: Samples) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of W (K, h, w) per sample, of the first and of the second stage."""
    device = next(model.parameters()).device
    stages: tuple[list[Tensor], list[Tensor]] = ([], [])
    for image, label in zip(samples.inputs(model), samples.labels, strict=True):
        seen = gather(model, image.to(device), label[None].to(device), stages=2)
        for stage, logits in zip(stages, seen.weight_logits, strict=True):
            stage.append(logits[0])
    return stages


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
        row, line = image_and_truth(scene, palette)
        occurring.update(np.unique(scene.label).tolist())
        for maps in weights.values():
            row.append(heat(maps[i]))
            known = maps[i][np.isfinite(maps[i])]
            line.append(f"mean {known.mean():.2f}" if known.size else "no label")
        rows.append(row)
        notes.append(line)
    width = width_of(rows)
    footer = [_colour_bar(width), key(occurring, classes, palette, width=width)]
    columns = ["image", "ground truth", *weights]
    title = "How much each pixel gathers from its right class"
    return grid(rows, columns=columns, notes=notes, title=title, footer=footer, font_size=FONT)


def class_weight_sheet(
    scene: Scene,
    weights: Mapping[str, NDArray[np.floating]],
    palette: Pixels,
    *,
    columns: int = 4,
) -> Image.Image:
    """One image, its ground truth, and the weight of each of its classes at every pixel.

    Args:
        scene: the image.
        weights: for each class's name (H, W) in [0, 1].
        palette: (K, 3) uint8.
        columns: pictures per row.
    """
    left, _ = image_and_truth(scene, palette)
    pictures = [*left, *(heat(values) for values in weights.values())]
    names = [printable(name, longest=LONGEST_NAME) for name in (scene.name, *weights)]
    notes = [names[0], "ground truth", *(f"W of {name}" for name in names[1:])]
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    lines = [notes[i : i + columns] for i in range(0, len(notes), columns)]
    bar = _colour_bar(width_of(rows))
    title = "How much each pixel gathers from one class"
    return grid(rows, notes=lines, title=title, footer=[bar], font_size=FONT)


def heat(weights: NDArray[np.floating]) -> Pixels:
    """Weights (H, W) in [0, 1] in colours from dark (0) to bright (1); pale grey for NaN."""
    known = np.isfinite(weights)
    levels = (np.where(known, weights, 0).clip(0, 1) * (_LEVELS - 1) + 0.5).astype(int)
    colours = _colour_map()[levels]
    picture = np.where(known[..., None], colours, np.array(_NO_WEIGHT, np.uint8))
    return sized(picture, smooth=True)


def _colour_bar(width: int) -> Image.Image:
    """The colours of the weights from 0 to 1, labelled."""
    font = ImageFont.load_default(FONT)
    bar = Image.new("RGB", (width, 2 * FONT + 8), (255, 255, 255))
    draw = ImageDraw.Draw(bar)
    texts = ("weight W:  0", "1")
    left = int(font.getlength(texts[0])) + 10
    ramp = _colour_map()[None].repeat(FONT + 4, 0).repeat(4, 1)
    bar.paste(Image.fromarray(ramp), (left, 6))
    draw.text((0, 6), texts[0], fill=(40, 42, 48), font=font)
    draw.text((left + ramp.shape[1] + 8, 6), texts[1], fill=(40, 42, 48), font=font)
    return bar


def _colour_map() -> Pixels:
    """(_LEVELS, 3) uint8."""
    from matplotlib import colormaps

    return (colormaps["inferno"](np.linspace(0, 1, _LEVELS))[:, :3] * 255 + 0.5).astype(np.uint8)
