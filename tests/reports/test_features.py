"""The t-SNE of class vectors and its silhouette (Figure 6)."""

from __future__ import annotations

import numpy as np
import pytest

from mcibi_fast.reports.features import Space, embed, embedding_chart, separation


def clusters() -> Space:
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 1, 3], 8)
    return Space("space", classes, 10.0 * classes[:, None] + rng.normal(size=(24, 5)))


def test_embedding_repeats_and_keeps_clusters_apart() -> None:
    space = clusters()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    points = embed(space.vectors)
    assert np.array_equal(points, embed(space.vectors))
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert np.array_equal(space.classes[distance.argmin(1)], space.classes)
    with pytest.raises(ValueError, match="9 are too few for t-SNE, at least 10"):
        embed(space.vectors[:9])


def test_separation_is_the_silhouette() -> None:
    space = clusters()
    X, y = space.vectors, space.classes
    distance = np.linalg.norm(X[:, None] - X[None], axis=-1)
    expected = []
    for i in range(len(X)):
        within = distance[i, (y == y[i]) & (np.arange(len(X)) != i)].mean()
        nearest = min(distance[i, y == k].mean() for k in set(y.tolist()) - {y[i]})
        expected.append((nearest - within) / max(nearest, within))
    assert separation(space) == pytest.approx(np.mean(expected))
    assert separation(Space("one", y[:8], X[:8])) is None


def test_chart_colours_dots_by_class_and_adds_stars() -> None:
    space = clusters()
    starred = Space("with stars", space.classes, space.vectors, stars=np.zeros((4, 5)))
    palette = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)
    figure = embedding_chart([space, starred], ["a", "b", "c", "d"], palette)
    left, right = figure.axes
    (dots,) = left.collections
    assert np.allclose(dots.get_facecolor()[:, :3], palette[space.classes] / 255)
    assert len(right.collections) == 2 and len(right.collections[1].get_offsets()) == 3
    assert np.allclose(right.collections[1].get_facecolor()[:, :3], palette[[0, 1, 3]] / 255)
    assert "silhouette" in left.get_title() and left.get_title().startswith("space")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["a", "b", "d", "C_dl (memory)"]  # c does not occur
