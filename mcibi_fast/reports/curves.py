"""Charts of a run: training curves, IoU per class, what the memory holds and held."""

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

History = Sequence[dict[str, Any]]
"""The lines of a run's history (`training.run.Run.history`)."""

COLOURS = ("#4c6a92", "#d1603d", "#5a8f5a", "#8a5a9e")
INK = "#28303a"
_TERMS = {
    "loss": "loss (sum of its terms)",
    "loss_cls": "loss_cls: of the prediction O (Eq. 15)",
    "loss_pr": "loss_pr: of the weights W (Eq. 14)",
    "loss_cwi": "loss_cwi: of the within-image head",
    "loss_aux": "loss_aux: of the auxiliary head",
}
LEGEND_CLASSES = 40
_NAME = 24  # characters of a class's name in a legend


def training_curves(histories: Mapping[str, Sequence[History]]) -> Figure:
    """mIoU, learning rate, and the loss with each of its terms against the step.

    Args:
        histories: for each model's name, the histories of its runs; one colour per model, one line
            per run. A panel has the models that have such a term.
    """
    every = [entry for runs in histories.values() for history in runs for entry in history]
    terms = list(dict.fromkeys(name for entry in every for name in entry.get("losses", ())))
    titles = ["mIoU on the validation split (%)", "loss (sum of its terms)", "learning rate"]
    titles += [_TERMS.get(name, name) for name in terms]
    columns = 3
    rows = -(-len(titles) // columns)
    figure, panels = axes_of(rows, columns, size=(11.5, 2.7 * rows + 0.5))
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title, fontsize=10, loc="left")
    for axes in panels[len(titles) :]:
        axes.remove()
    for colour, (name, runs) in zip(cycle(COLOURS), histories.items(), strict=False):
        for i, history in enumerate(runs):
            lines = [_scores(history), _values(history, "loss"), _values(history, "lr")]
            lines += [_values(history, "losses", term) for term in terms]
            for j, (axes, line) in enumerate(zip(panels, lines, strict=False)):
                if line:
                    label = name if i == j == 0 else None
                    mark = "." if j == 0 else None
                    axes.plot(
                        *zip(*line, strict=True), color=colour, lw=1.3, marker=mark, label=label
                    )
    for axes in panels[: len(titles)]:
        axes.set(xlim=(0, None), ylim=(0, None))
    for axes in panels[max(0, len(titles) - columns) : len(titles)]:
        axes.set_xlabel("step")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _values(history: History, *keys: str) -> list[tuple[int, float]]:
    points = []
    for entry in history:
        value: Any = entry
        for key in keys:
            value = value.get(key, {})
        if isinstance(value, (int, float)):
            points.append((entry["step"], value))
    return points


def _scores(history: History) -> list[tuple[int, float]]:
    return [(step, 100 * value) for step, value in _values(history, "metrics", "mean_iou")]


def class_bars(classes: Sequence[str], scores: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """IoU per class, one bar per model.

    Args:
        classes: K names.
        scores: for each model's name, per run K fractions (NaN: no such class); the bar is their
            mean, the whisker reaches from the smallest to the largest.
    """
    height = 1.2 + len(classes) * (0.16 + 0.13 * len(scores))
    figure, (axes,) = axes_of(1, 1, size=(6.4, height))
    positions = np.arange(len(classes))
    width = 0.84 / len(scores)
    for i, (colour, (name, runs)) in enumerate(zip(cycle(COLOURS), scores.items(), strict=False)):
        values = 100 * np.array(runs, float)
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
            label=name,
        )
        for place, value, reach in zip(places, mean, np.fmax.reduce(values), strict=True):
            if np.isfinite(value):
                text = f"{value:.1f}"
                axes.text(reach + 0.8, place, text, va="center", fontsize=8, color=INK)
    axes.set_yticks(positions, classes)
    axes.set_title("Intersection over union of each class", fontsize=12, loc="left")
    axes.set(xlabel="IoU (%)", xlim=(0, 109), ylim=(len(classes) - 0.4, -0.6))
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", lw=0.4, alpha=0.5)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
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
    figure, (axes,) = axes_of(1, 1, size=(6.4, 1.2 + 0.26 * len(classes)))
    rows = np.arange(len(classes))
    for row, (mean, deviation), colour in zip(rows, memory, palette / 255, strict=True):
        axes.plot([mean - deviation, mean + deviation], [row, row], color=colour, lw=6, alpha=0.55)
        axes.plot([mean], [row], "o", color=colour, mec=INK, mew=0.8, ms=6)
    axes.axvline(0, color=INK, lw=0.5)
    axes.set_title("The memory: one Gaussian per class", fontsize=12, loc="left")
    axes.set_yticks(rows, classes)
    axes.invert_yaxis()
    axes.set_xlabel("mean ± standard deviation over the channels of R")
    return figure


def memory_over_time(
    history: History, classes: Sequence[str], palette: NDArray[np.uint8]
) -> Figure | None:
    """Mean and standard deviation of every class in the memory, as training went on.

    Args:
        history: lines ``{"step", "epoch", "memory": {"mean": [K], "std": [K]}}`` are drawn, others
            left aside. None is returned where there is no such line.
        classes: K names.
        palette: (K, 3) uint8.
    """
    from matplotlib.patheffects import withStroke

    lines = [entry for entry in history if "memory" in entry]
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
        values = np.array([entry["memory"][key] for entry in lines], float)
        for k, colour in enumerate(palette / 255):
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


def short(name: str) -> str:
    """A class's name, cut to what a legend has room for."""
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"


def legend_columns(labels: Sequence[str], width: float) -> int:
    """How many columns of these labels fit into a figure of so many inches."""
    longest = max((len(label) for label in labels), default=0)
    return max(1, min(int(width / (0.75 + 0.085 * longest)), len(labels)))


def png(figure: Figure, *, dpi: int = 140) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def axes_of(rows: int, columns: int, *, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure outside pyplot, so that no window system or global state is touched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", lw=0.4, alpha=0.5)
        ax.set_axisbelow(True)
    return figure, axes
