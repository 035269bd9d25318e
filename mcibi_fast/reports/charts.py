"""What the charts of a report share: axes, colours, legends, and saving as PNG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from mcibi_fast.terminal import printable

CHART_CLASSES = 256
"""Largest number of classes that a chart shows; the first ones are shown."""

COLOURS = ("#4c6a92", "#d1603d", "#5a8f5a", "#8a5a9e")
INK = "#28303a"
LEGEND_CLASSES = 40
POINTS = 4000
"""Largest number of points of a line; of more, every second, third, ... is drawn."""
LONGEST_NAME = 60  # characters of a name in a picture
_LEGEND_NAME = 24
_LARGEST = 1e30
_Item = TypeVar("_Item")


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
    with warnings.catch_warnings():  # letters that no font here has are drawn as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def drawable(values: ArrayLike) -> NDArray[np.float64]:
    """Numbers with NaN, which is not drawn, in place of infinite ones and those close to it."""
    numbers = np.array(values, float)
    return np.where(np.abs(numbers) < _LARGEST, numbers, np.nan)


def thinned(line: Sequence[_Item]) -> Sequence[_Item]:
    """At most `POINTS` entries at equal intervals."""
    return line[:: -(-len(line) // POINTS)] if line else line


def plain(name: str, longest: int = LONGEST_NAME) -> str:
    """A name as matplotlib draws it letter by letter, where "$x$" would be mathematics."""
    return printable(name, longest=longest).replace("$", r"\$")


def short(name: str) -> str:
    """A class's name, shortened to fit into a legend."""
    return plain(name, _LEGEND_NAME)


def first_of(classes: Sequence[str]) -> str:
    """A sentence that ends a caption where a chart leaves classes out; else ""."""
    if len(classes) <= CHART_CLASSES:
        return ""
    return f" The first {CHART_CLASSES} of {len(classes):,} classes."


def legend_columns(labels: Sequence[str], width: float) -> int:
    """How many columns of these labels fit into a figure ``width`` inches wide."""
    longest = max((len(label) for label in labels), default=0)
    return max(1, min(int(width / (0.75 + 0.085 * longest)), len(labels)))
