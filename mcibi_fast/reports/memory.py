"""The section "What the memory holds": its Gaussians after training and during it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from mcibi_fast.data import SegmentationDataset
from mcibi_fast.reports.charts import (
    CHART_CLASSES,
    INK,
    LEGEND_CLASSES,
    axes_of,
    drawable,
    first_of,
    legend_columns,
    plain,
    png,
    short,
    thinned,
)
from mcibi_fast.reports.curves import History
from mcibi_fast.reports.gathering import gaussian_memory_of
from mcibi_fast.reports.page import Report
from mcibi_fast.reports.samples import Trained


def add_memory(report: Report, trained: Sequence[Trained], dataset: SegmentationDataset) -> None:
    """Adds the section: the memory of each model that has one, and how it got there."""
    remembering = [
        (each, memory) for each in trained if (memory := gaussian_memory_of(each.model)) is not None
    ]
    if not remembering:
        return
    report.heading("What the memory holds")
    for each, memory in remembering:
        report.picture(
            png(memory_chart(memory.memory.cpu().numpy(), dataset.classes, dataset.palette)),
            f"{each.name}: mean and standard deviation that represent each class (Eqs. 6-9)."
            + first_of(dataset.classes),
            name="memory",
        )
        chart = memory_over_time(each.history, dataset.classes, dataset.palette)
        if chart is not None:
            report.picture(
                png(chart),
                f"{each.name}: the same two numbers for each class at the end of every epoch.",
                name="memory_over_time",
                wide=True,
            )


def memory_chart(
    memory: NDArray[np.floating], classes: Sequence[str], palette: NDArray[np.uint8]
) -> Figure:
    """The memory's Gaussians: a dot at each class's mean, a bar of one deviation to each side.

    Args:
        memory: (K, 2), mean and standard deviation.
        classes: K names.
        palette: (K, 3) uint8.
    """
    classes = classes[:CHART_CLASSES]
    memory, palette = drawable(memory[:CHART_CLASSES]), palette[:CHART_CLASSES]
    figure, (axes,) = axes_of(1, 1, size=(6.4, 1.2 + 0.26 * len(classes)))
    rows = np.arange(len(classes))
    for row, (mean, deviation), colour in zip(rows, memory, palette / 255, strict=True):
        axes.plot([mean - deviation, mean + deviation], [row, row], color=colour, lw=6, alpha=0.55)
        axes.plot([mean], [row], "o", color=colour, mec=INK, mew=0.8, ms=6)
    axes.axvline(0, color=INK, lw=0.5)
    axes.set_title("The memory: one Gaussian per class", fontsize=12, loc="left")
    axes.set_yticks(rows, [plain(name) for name in classes])
    axes.invert_yaxis()
    axes.set_xlabel("mean ± standard deviation over the channels of R")
    return figure


def memory_over_time(
    history: History, classes: Sequence[str], palette: NDArray[np.uint8]
) -> Figure | None:
    """Mean and standard deviation of every class in the memory over the training.

    Args:
        history: lines ``{"step", "epoch", "memory": {"mean": [K], "std": [K]}}`` are drawn, other
            lines and those of another K are ignored.
        classes: K names.
        palette: (K, 3) uint8.

    Returns:
        The chart, or None if no line holds a memory.
    """
    lines = thinned(
        [e for e in history if "memory" in e and len(e["memory"]["mean"]) == len(classes)]
    )
    if not lines:
        return None
    steps = [entry["step"] for entry in lines]
    marker = "o" if len(steps) <= 40 else None
    names = [short(name) for name in classes[:LEGEND_CLASSES]]
    across = legend_columns(names, 11.5)
    figure, panels = axes_of(1, 2, size=(11.5, 3.8 + 0.24 * -(-len(names) // across)))
    outline = [withStroke(linewidth=2.8, foreground="#8b9097")]
    for axes, key, title in zip(
        panels, ("mean", "std"), ("mean μ (Eq. 9)", "standard deviation σ (Eq. 9)"), strict=True
    ):
        values = drawable([entry["memory"][key] for entry in lines])
        for k, colour in enumerate(palette[:CHART_CLASSES] / 255):
            label = names[k] if key == "mean" and k < len(names) else None
            axes.plot(
                steps,
                values[:, k],
                color=colour,
                lw=2,
                marker=marker,
                ms=3.5,
                label=label,
                path_effects=outline,
            )
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("training step (one reading per epoch)")
    figure.suptitle("The memory as training goes on", x=0.01, ha="left", fontsize=13)
    figure.legend(loc="outside lower center", ncols=across, frameon=False)
    return figure
