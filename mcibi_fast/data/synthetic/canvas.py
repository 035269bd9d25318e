"""Drawing primitives of the built-in scenes: a canvas, signed distances, noise.

Lengths are in units of the image's shorter side, so a scene looks the same at every size. Shapes
are signed distances (negative inside); an edge is anti-aliased by turning the distance, in pixels,
into coverage, which costs a fraction of supersampling and is as smooth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mcibi_fast.data.base import IGNORE_INDEX

Array = NDArray[np.floating[Any]]  # float32 throughout

_LATTICE = 32  # period of the noise, in lattice cells


class Window:
    """A rectangle of the canvas: views of its colours and labels, and its coordinates.

    ``x`` is (1, w) and ``y`` is (h, 1), so that arithmetic on both broadcasts to (h, w).
    """

    def __init__(self, canvas: Canvas, rows: slice, columns: slice) -> None:
        self.scale = canvas.scale
        self.x = canvas.x[:, columns]
        self.y = canvas.y[rows]
        self.rgb = canvas.rgb[rows, columns]
        self.label = canvas.label[rows, columns]

    def coverage(self, distance: Array) -> Array:
        """Signed distance (h, w) in units -> how much of each pixel lies inside, 0..1."""
        return np.clip(0.5 - distance * np.float32(self.scale), 0, 1)

    def fill(
        self,
        distance: Array,
        colour: ArrayLike,
        label: int | None = None,
        opacity: float = 1.0,
    ) -> None:
        """Paint where ``distance`` is negative; ``colour`` is (3,) or (h, w, 3).

        ``label`` is written where at least half of the pixel is covered; None leaves the labels.
        """
        covered = self.coverage(distance)
        self.blend(covered * np.float32(opacity), colour)
        if label is not None:
            self.label[covered >= 0.5] = label

    def blend(self, amount: Array, colour: ArrayLike) -> None:
        """Mix ``colour`` in by ``amount`` (h, w), 0..1; the labels stay."""
        self.rgb += amount[..., None] * (np.asarray(colour, dtype=np.float32) - self.rgb)

    def unlabel(self, distance: Array, thickness: float) -> None:
        """Leave a border of ``thickness`` units (a pixel at least) around distance 0 unlabelled."""
        half = max(thickness, 1.0 / self.scale) / 2
        self.label[np.abs(distance) <= half] = IGNORE_INDEX


class Canvas:
    """An image being drawn: ``rgb`` (H, W, 3) float32 in 0..1, ``label`` (H, W) uint8."""

    def __init__(self, height: int, width: int) -> None:
        self.scale: float = min(height, width)
        self.height = height / self.scale
        self.width = width / self.scale
        self.y: Array = ((np.arange(height, dtype=np.float32) + 0.5) / self.scale)[:, None]
        self.x: Array = ((np.arange(width, dtype=np.float32) + 0.5) / self.scale)[None, :]
        self.rgb = np.zeros((height, width, 3), np.float32)
        self.label = np.full((height, width), IGNORE_INDEX, np.uint8)

    def window(self, x0: float, y0: float, x1: float, y1: float) -> Window | None:
        """The pixels that touch the box (x0, y0)..(x1, y1); None when it is off the canvas."""
        height, width = self.label.shape
        top, bottom = _clip(y0, y1, self.scale, height)
        left, right = _clip(x0, x1, self.scale, width)
        if top >= bottom or left >= right:
            return None
        return Window(self, slice(top, bottom), slice(left, right))

    def band(self, y0: float, y1: float) -> Window | None:
        """The full-width rows between y0 and y1."""
        return self.window(0.0, y0, self.width, y1)


def _clip(low: float, high: float, scale: float, size: int) -> tuple[int, int]:
    return max(int(np.floor(low * scale)) - 1, 0), min(int(np.ceil(high * scale)) + 1, size)


def ellipse(w: Window, cx: float, cy: float, rx: float, ry: float) -> Array:
    """Distance to an ellipse with radii rx, ry; first-order, exact enough for anti-aliasing."""
    u, v = (w.x - cx) / rx, (w.y - cy) / ry
    radius = np.sqrt(u * u + v * v + 1e-12)
    slope = np.sqrt((u / rx) ** 2 + (v / ry) ** 2 + 1e-12) / radius
    return (radius - 1) / slope


def box(
    w: Window, cx: float, cy: float, half_width: float, half_height: float, r: float = 0.0
) -> Array:
    """Distance to a box of the given half sizes with corners rounded by r."""
    u = np.abs(w.x - cx) - (half_width - r)
    v = np.abs(w.y - cy) - (half_height - r)
    outside = np.sqrt(np.maximum(u, 0) ** 2 + np.maximum(v, 0) ** 2)
    return outside + np.minimum(np.maximum(u, v), 0) - r


def polygon(w: Window, corners: Sequence[tuple[float, float]]) -> Array:
    """Distance to a convex polygon; corners clockwise as seen on screen (y points down)."""
    distance = np.full((w.y.shape[0], w.x.shape[1]), -np.inf, np.float32)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        length = float(np.hypot(x1 - x0, y1 - y0))
        normal_x, normal_y = (y1 - y0) / length, (x0 - x1) / length
        edge = (w.x - x0) * np.float32(normal_x) + (w.y - y0) * np.float32(normal_y)
        np.maximum(distance, edge, out=distance)
    return distance


def noise(
    rng: np.random.Generator, x: Array, y: Array, fx: float, fy: float, octaves: int = 1
) -> Array:
    """Smooth value noise in 0..1 with fx, fy cells per unit; each octave doubles both.

    ``x`` has w and ``y`` h elements in any shape. Returns (h, w). Elementwise arithmetic only, so
    that the result does not depend on the number of threads.
    """
    total = np.zeros((y.size, x.size), np.float32)
    weight = 0.0
    for octave in range(octaves):
        lattice = rng.random((_LATTICE, _LATTICE), dtype=np.float32)
        shift_x, shift_y = rng.random(2) * _LATTICE
        i0, i1, f = _cells(x, fx * 2**octave, shift_x)
        j0, j1, g = _cells(y, fy * 2**octave, shift_y)
        rows = lattice[j0] + (lattice[j1] - lattice[j0]) * g[:, None]
        left = rows[:, i0]
        total += np.float32(0.5**octave) * (left + (rows[:, i1] - left) * f)
        weight += 0.5**octave
    return total / np.float32(weight)


def _cells(t: Array, frequency: float, shift: float) -> tuple[NDArray, NDArray, Array]:
    u = t.ravel() * np.float32(frequency) + np.float32(shift)
    cell = np.floor(u)
    f = u - cell
    index = cell.astype(np.int64)
    return index % _LATTICE, (index + 1) % _LATTICE, f * f * (3 - 2 * f)


def smoothstep(t: Array, low: float, high: float) -> Array:
    """0 below ``low``, 1 above ``high``, smooth between."""
    t = np.clip((t - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)


def mix(low: ArrayLike, high: ArrayLike, t: Array) -> Array:
    """Colours (3,) mixed by t (...): low at 0, high at 1; returns (..., 3)."""
    a = np.asarray(low, dtype=np.float32)
    b = np.asarray(high, dtype=np.float32)
    return a + (b - a) * t[..., None]
