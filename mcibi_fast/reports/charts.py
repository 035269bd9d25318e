"""What the charts of a report share: axes, colours, legends, and saving as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#4c6a92", "#d1603d", "#5a8f5a", "#8a5a9e")
INK = "#28303a"
LEGEND_CLASSES = 40
_NAME = 24  # characters of a class's name in a legend


def axes_of(rows: int, columns: int, *, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, made without pyplot, which would touch global state."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", lw=0.4, alpha=0.5)
        ax.set_axisbelow(True)
    return figure, axes


def png(figure: Figure, *, dpi: int = 140) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def short(name: str) -> str:
    """A class's name, shortened to fit into a legend."""
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"


def legend_columns(labels: Sequence[str], width: float) -> int:
    """How many columns of these labels fit into a figure ``width`` inches wide."""
    longest = max((len(label) for label in labels), default=0)
    return max(1, min(int(width / (0.75 + 0.085 * longest)), len(labels)))
