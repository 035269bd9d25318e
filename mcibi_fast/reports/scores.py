"""The section "IoU per class"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure

from mcibi_fast.reports.charts import CHART_CLASSES, COLOURS, INK, axes_of, first_of, plain, png
from mcibi_fast.reports.page import Report


def add_scores(
    report: Report, classes: Sequence[str], ious: Mapping[str, Sequence[Sequence[float]]]
) -> None:
    """Adds the section.

    Args:
        report: what it is added to.
        classes: K names.
        ious: for each model's name, per run K fractions (NaN: the class does not occur).
    """
    report.heading("IoU per class")
    several = max(len(runs) for runs in ious.values()) > 1
    whiskers = " Bars: means; whiskers: smallest and largest over seeds." if several else ""
    report.picture(
        png(class_bars(classes, ious)),
        "Intersection over union of each class on the validation split, in percent."
        + whiskers
        + first_of(classes),
        name="classes",
    )


def class_bars(classes: Sequence[str], scores: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """IoU per class, one bar per model.

    Args:
        classes: K names.
        scores: for each model's name, per run K fractions (NaN: the class does not occur); the bar
            is their mean, the whisker reaches from the smallest to the largest.
    """
    classes = classes[:CHART_CLASSES]
    height = 1.2 + len(classes) * (0.16 + 0.13 * len(scores))
    figure, (axes,) = axes_of(1, 1, size=(6.4, height))
    positions = np.arange(len(classes))
    width = 0.84 / len(scores)
    for i, (colour, (name, runs)) in enumerate(zip(cycle(COLOURS), scores.items(), strict=False)):
        values = 100 * np.clip(np.array(runs, float)[:, :CHART_CLASSES], 0, 1)
        mean = values.mean(0)
        whisker = [mean - values.min(0), values.max(0) - mean] if len(values) > 1 else None
        places = positions + (i - (len(scores) - 1) / 2) * width
        axes.barh(
            places,
            mean,
            width * 0.9,
            xerr=whisker,
            color=colour,
            ecolor=INK,
            capsize=2,
            label=plain(name),
        )
        for place, value, reach in zip(places, mean, np.fmax.reduce(values), strict=True):
            if np.isfinite(value):
                text = f"{value:.1f}"
                axes.text(reach + 0.8, place, text, va="center", fontsize=8, color=INK)
    axes.set_yticks(positions, [plain(name) for name in classes])
    axes.set_title("Intersection over union of each class", fontsize=12, loc="left")
    axes.set(xlabel="IoU (%)", xlim=(0, 109), ylim=(len(classes) - 0.4, -0.6))
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", lw=0.4, alpha=0.5)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
