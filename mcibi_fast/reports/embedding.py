"""Figure 6: per-image class vectors in the plane (t-SNE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from mcibi_fast.reports.curves import INK, LEGEND_CLASSES, axes_of, legend_columns, short

MIN_VECTORS = 10
MAX_VECTORS = 2000
_SEED = 0


@dataclass(frozen=True)
class Space:
    """One panel of the figure.

    Attributes:
        title: over it.
        classes: (n,) of the vectors.
        vectors: (n, Z).
        stars: a representation per class (K, Z) in the same space, or None.
    """

    title: str
    classes: NDArray[np.integer]
    vectors: NDArray[np.floating]
    stars: NDArray[np.floating] | None = None


def embed(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """t-SNE of vectors (n, Z) -> (n, 2), from a fixed random state of its own.

    Raises:
        ValueError: fewer than `MIN_VECTORS`.
    """
    from sklearn.manifold import TSNE

    if len(vectors) < MIN_VECTORS:
        raise ValueError(f"vectors: {len(vectors)} are too few for t-SNE, at least {MIN_VECTORS}")
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=_SEED).fit_transform(vectors)


def separation(space: Space) -> float | None:
    """Mean silhouette of the vectors, in [-1, 1]: 1 where each class is apart and compact.

    None where it is not defined: one class alone, or none with two vectors.
    """
    from sklearn.metrics import silhouette_score

    if not 1 < len(np.unique(space.classes)) < len(space.classes):
        return None
    return float(silhouette_score(space.vectors, space.classes))


def embedding_chart(
    spaces: Sequence[Space], classes: Sequence[str], palette: NDArray[np.uint8]
) -> Figure:
    """One panel per space; a dot per image and class, a star per class that occurs.

    Spaces with more than `MAX_VECTORS` vectors are thinned out evenly.

    Args:
        spaces: what is drawn.
        classes: K names.
        palette: (K, 3) uint8.
    """
    seen, counts = np.unique(np.concatenate([s.classes for s in spaces]), return_counts=True)
    named = sorted(seen[np.argsort(-counts, kind="stable")][:LEGEND_CLASSES].tolist())
    handles = [
        Line2D([], [], ls="", marker="o", ms=8, mec=INK, mew=0.4, mfc=tuple(palette[k] / 255))
        for k in named
    ]
    labels = [short(classes[k]) for k in named]
    if any(space.stars is not None for space in spaces):
        handles.append(Line2D([], [], ls="", marker="*", ms=12, mec=INK, mew=0.8, mfc="white"))
        labels.append("C_dl (memory)")
    if len(seen) > len(named):
        handles.append(Line2D([], [], ls=""))
        labels.append(f"and {len(seen) - len(named)} rarer")

    columns = min(len(spaces), 3)
    rows = -(-len(spaces) // columns)
    width = max(5.8, 0.3 + 4.1 * columns)
    across = legend_columns(labels, width)
    height = 4.4 * rows + 0.7 + 0.26 * -(-len(labels) // across)
    figure, panels = axes_of(rows, columns, size=(width, height))
    for axes in panels[len(spaces) :]:
        axes.remove()
    for axes, space in zip(panels, spaces, strict=False):
        _draw(axes, _thinned(space), palette / 255)
    figure.suptitle("One dot: the features of one class in one image (t-SNE)", fontsize=13)
    figure.legend(handles, labels, loc="outside lower center", ncols=across, frameon=False)
    return figure


def _thinned(space: Space) -> Space:
    step = -(-len(space.classes) // MAX_VECTORS)
    return replace(space, classes=space.classes[::step], vectors=space.vectors[::step])


def _draw(axes: Axes, space: Space, colours: NDArray[np.float64]) -> None:
    classes, vectors = space.classes, space.vectors
    starred = np.unique(classes) if space.stars is not None else np.empty(0, int)
    if space.stars is not None:
        vectors = np.concatenate([vectors, space.stars[starred]])
    points = embed(vectors)
    (x, y), stars = points[: len(classes)].T, points[len(classes) :].T
    axes.scatter(x, y, s=26, c=colours[classes], edgecolors=INK, linewidths=0.3)
    if len(starred):
        size = 130 if len(starred) <= LEGEND_CLASSES else 60
        axes.scatter(
            stars[0],
            stars[1],
            s=size,
            c=colours[starred],
            marker="*",
            edgecolors=INK,
            linewidths=0.9,
            zorder=3,
        )
    score = separation(space)
    subtitle = "" if score is None else f" (silhouette {score:.2f})"
    axes.set_title(space.title + subtitle, fontsize=11)
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(True)
    axes.spines[:].set_color("#c9c5bc")
