"""The section "Features": t-SNE of per-image class vectors (Figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from mcibi_fast.data import SegmentationDataset
from mcibi_fast.reports.charts import (
    INK,
    LEGEND_CLASSES,
    axes_of,
    legend_columns,
    plain,
    png,
    short,
)
from mcibi_fast.reports.gathering import collect
from mcibi_fast.reports.page import Report
from mcibi_fast.reports.samples import Trained, spread

EMBEDDED_IMAGES = 60
MIN_VECTORS = 10
MAX_VECTORS = 2000
_SEED = 0


@dataclass(frozen=True)
class Space:
    """The vectors of one panel.

    Attributes:
        title: above the panel.
        classes: (n,), the class of each vector.
        vectors: (n, Z).
        stars: a representation per class (K, Z) in the same space, or None.
    """

    title: str
    classes: NDArray[np.integer]
    vectors: NDArray[np.floating]
    stars: NDArray[np.floating] | None = None


def add_features(
    report: Report,
    trained: Sequence[Trained],
    dataset: SegmentationDataset,
    *,
    count: int = EMBEDDED_IMAGES,
    progress: bool = False,
) -> None:
    """Adds the section: class vectors of ``count`` images before and after the context."""
    indices = spread(len(dataset), count)
    spaces = []
    for each in trained:
        found = collect(each.model, dataset, indices, progress=progress)
        if found.R_aug is None:
            spaces.append(Space(f"{each.name}\nR", found.classes, found.R))
            continue
        spaces += [
            Space(f"{each.name}\nR, before the context", found.classes, found.R, found.C_dl),
            Space(f"{each.name}\nR_aug, after the context", found.classes, found.R_aug),
        ]
    report.heading("Features")
    if min(len(space.classes) for space in spaces) < MIN_VECTORS:
        report.text(f"Too few images for t-SNE, which needs at least {MIN_VECTORS} vectors.")
        return
    stars = any(space.stars is not None for space in spaces)
    report.text(
        "A dot is the mean of the features of one class in one image: R, the pixel "
        "representations (Eq. 1), and R_aug, augmented with the dataset-level context (Eq. 4). "
        "Classes are well separated if colours lie apart. The silhouette expresses this as a "
        "number, computed before t-SNE: 1 means apart and compact, 0 overlapping."
        + (
            " A star is a class's dataset-level representation, drawn from its Gaussian in the "
            "memory (Eq. 11). Its channels have the mean and the deviation of the class, but "
            "each is drawn at random, so a star need not lie among the dots of its class."
            if stars
            else ""
        )
    )
    report.picture(
        png(embedding_chart(spaces, dataset.classes, dataset.palette)),
        f"t-SNE of per-image class vectors of {len(indices)} images, as Figure 6 of the paper. "
        "Each panel is projected by itself: positions cannot be compared between panels.",
        name="features",
        wide=True,
    )


def embed(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """t-SNE of vectors (n, Z) -> (n, 2), the same in every run.

    Raises:
        ValueError: there are fewer than `MIN_VECTORS`.
    """
    from sklearn.manifold import TSNE

    if len(vectors) < MIN_VECTORS:
        raise ValueError(f"vectors: {len(vectors)} are too few for t-SNE, at least {MIN_VECTORS}")
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=_SEED).fit_transform(vectors)


def separation(space: Space) -> float | None:
    """Mean silhouette of the vectors, in [-1, 1]: 1 if each class is apart and compact.

    None if it is not defined: there is only one class, or no class has two vectors.
    """
    from sklearn.metrics import silhouette_score

    if not 1 < len(np.unique(space.classes)) < len(space.classes):
        return None
    return float(silhouette_score(space.vectors, space.classes))


def embedding_chart(
    spaces: Sequence[Space], classes: Sequence[str], palette: NDArray[np.uint8]
) -> Figure:
    """One panel per space, with a dot per image and class and a star per class that occurs.

    Spaces with more than `MAX_VECTORS` vectors are thinned out evenly.

    Args:
        spaces: one per panel.
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
    title = "\n".join(map(plain, space.title.split("\n")))
    axes.set_title(title + subtitle, fontsize=11)
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(True)
    axes.spines[:].set_color("#c9c5bc")
