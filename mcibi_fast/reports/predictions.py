"""The section "Predictions": images beside their labels and what each model predicts (Figure 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mcibi_fast.inference.precision import in_words, precision_of
from mcibi_fast.models import Segmentor
from mcibi_fast.reports.gathering import gather
from mcibi_fast.reports.page import Report
from mcibi_fast.reports.samples import Samples, Trained
from mcibi_fast.reports.sheets import (
    FONT,
    Scene,
    image_and_truth,
    key,
    labelled,
    mistaken,
    sized,
    width_of,
)
from mcibi_fast.viz.overlay import Pixels, colourise, grid, mark


def add_predictions(report: Report, trained: Sequence[Trained], samples: Samples) -> None:
    """Adds the section: image, ground truth and each model's prediction."""
    dataset = samples.dataset
    predictions = {
        each.name: [
            _predicted(each.model, image, label)
            for image, label in zip(samples.inputs(each.model), samples.labels, strict=True)
        ]
        for each in trained
    }
    report.heading("Predictions")
    report.picture(
        prediction_sheet(samples.scenes, predictions, dataset.classes, dataset.palette),
        "Images at even intervals through the split, not selected by their results. Colours are "
        "the predicted classes; hatched pixels are mistaken. Under each prediction: the share of "
        f"labelled pixels that is right. Computed in {_precisions(trained)}, as in the training. "
        "As Figure 5 of the paper.",
        name="predictions",
        wide=True,
    )


def _precisions(trained: Sequence[Trained]) -> str:
    words = {
        each.name: in_words(precision_of(each.model, next(each.model.parameters()).device))
        for each in trained
    }
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return ", ".join(f"{words[name]} ({name})" for name in words)


def _predicted(model: Segmentor, image: Tensor, label: Tensor) -> NDArray[np.int64]:
    device = next(model.parameters()).device
    seen = gather(model, image.to(device), label[None].to(device))
    size = (label.shape[0], label.shape[1])
    return model.head.class_map(seen.output.logits, size)[0].cpu().numpy()


def prediction_sheet(
    scenes: Sequence[Scene],
    predictions: Mapping[str, Sequence[NDArray[np.integer]]],
    classes: Sequence[str],
    palette: Pixels,
) -> Image.Image:
    """Image, ground truth and each model's prediction with its mistakes hatched (Figure 5).

    The note under each prediction is the share of labelled pixels that is right.

    Args:
        scenes: one row each.
        predictions: for each model's name (H, W) class indices per scene.
        classes: K names; the legend has those that occur.
        palette: (K, 3) uint8.
    """
    rows, notes = [], []
    occurring: set[int] = set()
    for i, scene in enumerate(scenes):
        row, line = image_and_truth(scene, palette)
        occurring.update(np.unique(scene.label).tolist())
        for maps in predictions.values():
            wrong = mistaken(maps[i], scene.label, len(classes))
            known = labelled(scene.label, len(classes))
            occurring.update(np.unique(maps[i]).tolist())
            wrong_there = sized(wrong.astype(np.uint8), smooth=False) > 0
            row.append(mark(sized(colourise(maps[i], palette), smooth=False), wrong_there))
            right = 100 * (1 - wrong.sum() / max(known.sum(), 1))
            line.append(f"{right:.1f} % right")
        rows.append(row)
        notes.append(line)
    below = key(occurring, classes, palette, width=width_of(rows), hatched=True)
    columns = ["image", "ground truth", *predictions]
    title = "Predictions; mistaken pixels are hatched"
    return grid(rows, columns=columns, notes=notes, title=title, footer=[below], font_size=FONT)
