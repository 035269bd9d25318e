"""Charts of a run: training curves, IoU per class, what the memory holds."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

COLOURS = ("#4c6a92", "#d1603d", "#5a8f5a", "#8a5a9e")
_INK = "#28303a"


def training_curves(histories: Mapping[str, Sequence[Sequence[dict[str, Any]]]]) -> Figure:
    """Loss and mIoU against the step.

    Args:
        histories: for each model's name, the histories of its runs (`engine.run.Run.history`);
            one colour per model, one line per run.
    """
    figure, (left, right) = _axes(1, 2, size=(10, 3.4))
    for colour, (name, runs) in zip(cycle(COLOURS), histories.items(), strict=False):
        for i, history in enumerate(runs):
            label = name if i == 0 else None
            losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
            scores = [
                (entry["step"], 100 * (entry["metrics"]["mean_iou"] or 0))
                for entry in history
                if "metrics" in entry
            ]
            left.plot(*zip(*losses, strict=True), color=colour, lw=1.2, label=label)
            right.plot(*zip(*scores, strict=True), color=colour, lw=1.2, marker=".", label=label)
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="step", ylabel="mIoU (%)", ylim=(0, None))
    left.legend(frameon=False)
    return figure


def class_bars(classes: Sequence[str], scores: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """IoU per class, one bar per model.

    Args:
        classes: K names.
        scores: for each model's name, per run K fractions (NaN: no such class); the bar is their
            mean, the whisker reaches from the smallest to the largest.
    """
    figure, (axes,) = _axes(1, 1, size=(10, 3.4))
    positions = np.arange(len(classes))
    width = 0.8 / len(scores)
    for i, (colour, (name, runs)) in enumerate(zip(cycle(COLOURS), scores.items(), strict=False)):
        values = 100 * np.array(runs, float)
        mean = values.mean(0)
        whisker = [mean - values.min(0), values.max(0) - mean] if len(values) > 1 else None
        axes.bar(
            positions + (i - (len(scores) - 1) / 2) * width,
            mean,
            width * 0.92,
            yerr=whisker,
            color=colour,
            ecolor=_INK,
            capsize=2,
            label=name,
        )
    axes.set_xticks(positions, classes, rotation=35, ha="right")
    axes.set(ylabel="IoU (%)", ylim=(0, 100))
    axes.legend(frameon=False, ncols=len(scores), loc="upper right", bbox_to_anchor=(1, 1.16))
    return figure


def memory_chart(
    memory: NDArray[np.floating], classes: Sequence[str], palette: NDArray[np.uint8]
) -> Figure:
    """The memory's Gaussians: a dot at each class's mean, a bar of one deviation to each side.

    Args:
        memory: (K, 2), mean and standard deviation.
        classes: K names.
        palette: (K, 3) uint8.
    """
    figure, (axes,) = _axes(1, 1, size=(10, 0.9 + 0.24 * len(classes)))
    rows = np.arange(len(classes))
    for row, (mean, deviation), colour in zip(rows, memory, palette / 255, strict=True):
        axes.plot([mean - deviation, mean + deviation], [row, row], color=colour, lw=6, alpha=0.55)
        axes.plot([mean], [row], "o", color=colour, mec=_INK, mew=0.8, ms=6)
    axes.axvline(0, color=_INK, lw=0.5)
    axes.set_yticks(rows, classes)
    axes.invert_yaxis()
    axes.set_xlabel("mean ± standard deviation over the channels of R")
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _axes(rows: int, columns: int, *, size: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    """A figure outside pyplot, so that no window system or global state is touched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", lw=0.4, alpha=0.5)
        ax.set_axisbelow(True)
    return figure, axes
