"""The built-in dataset: procedural scenes in which context decides between look-alikes.

Four pairs of classes share their colours and texture, painted by the same code:

==============  ====================================================================
sky, water      the same gradient and streaks
sand, field     the same drifts and grain
rock, bale      the same rounded tan bodies
boat, car       the same paints, cabins and dark undersides (their outlines differ)
==============  ====================================================================

Only the rest of the image tells them apart. A scene's type (street 20%, coast 30%, farm 30%,
lake 20%) decides which classes can appear together: `PRESENCE` is the table of probabilities. Coast
and farm are laid out alike on purpose: 60% of the coasts are seen from above, water over sand, by
the same code and the same draws as a farm's sky over a field. Only the things in them differ: boats
on the water, trees and buildings at the field's edge, at least one in each image. The light
(`MOODS`) is drawn independently of the type, so colour gives nothing away. These numbers were set
before any model was trained on them.

A thin line along the borders between regions is unlabelled (255).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.base import SegmentationDataset, Transform
from mcibi_fast.data.synthetic import objects as paint
from mcibi_fast.data.synthetic.canvas import Array, Canvas, Window, ellipse, mix, noise, smoothstep

SCENES_CLASSES = [
    "sky", "water", "sand", "field", "grass", "road",
    "building", "tree", "boat", "car", "rock", "bale",
]  # fmt: skip
SKY, WATER, SAND, FIELD, GRASS, ROAD, BUILDING, TREE, BOAT, CAR, ROCK, BALE = range(12)

SCENES_PALETTE = np.array(
    [
        (135, 190, 235), (38, 98, 190), (240, 205, 120), (200, 140, 40), (130, 190, 70),
        (110, 110, 120), (190, 90, 70), (30, 110, 60), (230, 60, 150), (120, 50, 160),
        (150, 130, 110), (250, 230, 60),
    ],
    np.uint8,
)  # fmt: skip

LOOK_ALIKES = ((SKY, WATER), (SAND, FIELD), (ROCK, BALE), (BOAT, CAR))

SCENE_TYPES = ("street", "coast", "farm", "lake")
TYPE_PROBABILITY = (0.2, 0.3, 0.3, 0.2)

# The probability that a class is drawn into a scene of a type (columns: SCENES_CLASSES). A farm's
# tree and building are drawn together so that at least one is there.
PRESENCE = {
    #          sky water sand field grass road building tree boat car rock bale
    "street": (1.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 0.6, 0.0, 0.9, 0.0, 0.0),
    "coast":  (0.4, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.7, 0.0),
    "farm":   (1.0, 0.0, 0.0, 1.0, 0.3, 0.0, 0.65, 0.8, 0.0, 0.3, 0.0, 0.7),
    "lake":   (0.6, 1.0, 0.0, 0.0, 1.0, 0.0, 0.35, 1.0, 0.6, 0.0, 0.4, 0.0),
}  # fmt: skip

_SPLITS = {"train": 0, "val": 1, "test": 2}
_ASHORE = 0.3  # a boat on the sand, as often as a car in the field


class Scenes(SegmentationDataset):
    """Procedural scenes, 12 classes; each image depends only on (seed, split, index).

    Args:
        split: "train", "val" or "test"; splits never share an image.
        count: number of images.
        size: side of the square images, or (height, width), at least 16.
        seed: of the scenes; non-negative. Augmentation has its own seed, in ``transform``.
        transform: see `data.transforms`; None normalises and nothing else.

    Samples are dictionaries: ``image`` (3, H, W) float32, ``label`` (H, W) uint8 with 255 ignored,
    ``name``. Raises ValueError for an unknown split or arguments out of range.
    """

    mean = (0.579, 0.568, 0.506)
    std = (0.212, 0.167, 0.183)

    def __init__(
        self,
        split: str,
        *,
        count: int,
        size: int | tuple[int, int],
        seed: int,
        transform: Transform | None = None,
    ) -> None:
        super().__init__(transform)
        if split not in _SPLITS:
            raise ValueError(f"split: {split!r} is not one of {', '.join(_SPLITS)}")
        self.height, self.width = (size, size) if isinstance(size, int) else size
        if min(self.height, self.width) < 16:
            raise ValueError(f"size: {self.height}x{self.width} is too small, at least 16x16")
        if count < 1:
            raise ValueError(f"count: {count} images, at least 1")
        if seed < 0:
            raise ValueError(f"seed: {seed} is negative")
        self.split, self.count, self.seed = split, count, seed
        self.classes = list(SCENES_CLASSES)
        self.palette = SCENES_PALETTE.copy()

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.split}_{index:05d}"

    def scene_type(self, index: int) -> str:
        """The type of scene ``index``, one of SCENE_TYPES."""
        return _scene_type(self._generator(index))

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """Scene ``index``: image (H, W, 3) uint8, label (H, W) uint8."""
        return draw_scene(self._generator(index), self.height, self.width)

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, _SPLITS[self.split], index))


def draw_scene(
    rng: np.random.Generator, height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one scene from ``rng``: image (H, W, 3) uint8 and label (H, W) uint8."""
    kind = _scene_type(rng)
    scene = _Scene(rng, Canvas(height, width), kind)
    {"street": _street, "coast": _coast, "farm": _farm, "lake": _lake}[kind](scene)
    return scene.finish(), scene.canvas.label


def _scene_type(rng: np.random.Generator) -> str:
    return SCENE_TYPES[
        int(np.searchsorted(np.cumsum(TYPE_PROBABILITY[:-1]), rng.random(), "right"))
    ]


class _Scene:
    """A scene in progress: its canvas, its light, and its draws."""

    def __init__(self, rng: np.random.Generator, canvas: Canvas, kind: str) -> None:
        self.rng, self.canvas, self.presence = rng, canvas, PRESENCE[kind]
        self.mood = paint.MOODS[rng.integers(len(paint.MOODS))]
        self.light = (-1 if rng.random() < 0.5 else 1) * rng.uniform(
            0.4, 1.0
        )  # from the left or the right

    def has(self, label: int) -> bool:
        return self.rng.random() < self.presence[label]

    def count(self, low: int, high: int) -> int:
        """How many of a thing: low..high in a square image, more in a wide one."""
        return max(round(int(self.rng.integers(low, high + 1)) * self.canvas.width), 1)

    def across(self) -> float:
        """A place from left to right, not quite at the rim."""
        return self.rng.uniform(0.1, self.canvas.width - 0.1)

    def level(self, low: float, high: float) -> float:
        """A height in units, low..high given as shares of the image's height."""
        return self.rng.uniform(low, high) * self.canvas.height

    def edge(self, level: float, swing: float) -> Array:
        """A gently rolling line across the image around ``level``: (1, W)."""
        x, rng = self.canvas.x, self.rng
        roll = noise(rng, x, np.zeros(1, np.float32), 1.3, 1.0, octaves=2) - np.float32(0.5)
        slope = rng.uniform(-0.5, 0.5) * swing / self.canvas.width
        return np.float32(level) + swing * roll + slope * (x - self.canvas.width / 2)

    def at(self, edge: Array, x: float) -> float:
        """Height of ``edge`` at x."""
        return float(np.interp(x, self.canvas.x[0], edge[0]))

    def air(self, top: float, bottom: float, label: int) -> None:
        w = self.canvas.band(top, bottom)
        if w is not None:
            w.rgb[:] = paint.air(self.rng, w, top, bottom, self.mood)
            w.label[:] = label

    def ground(self, edge: Array, label: int) -> None:
        """Everything below ``edge``: earth, or grass. A pale rim and an unlabelled line mark it."""
        w = self.canvas.band(float(edge.min()), self.canvas.height)
        if w is None:
            return
        distance = edge - w.y
        grass = label == GRASS
        top = float(edge.mean())
        colour = (
            paint.lawn(self.rng, w, self.mood)
            if grass
            else paint.earth(self.rng, w, top, self.mood)
        )
        w.fill(distance, colour, label)
        rim = smoothstep(-np.abs(distance + 0.01), -0.035, 0.0) * np.float32(0.3)
        w.blend(rim, self.mood.shine)
        w.unlabel(distance, 0.012)

    def bodies(self, edge: Array, label: int) -> None:
        """Boulders below ``edge``, the far ones first and smaller."""
        for depth in np.sort(self.rng.uniform(0.15, 0.95, self.count(1, 4))).tolist():
            x = self.across()
            top = self.at(edge, x)
            y = top + depth * (self.canvas.height - top)
            r = (0.035 + 0.075 * depth) * self.rng.uniform(0.8, 1.2)
            paint.boulder(self.rng, self.canvas, x, y, r, self.light, self.mood, label)

    def trees(self, edge: Array, low: int, high: int, size: tuple[float, float]) -> None:
        for _ in range(self.count(low, high)):
            x, tall = self.across(), self.rng.uniform(*size)
            base = self.at(edge, x) + self.rng.uniform(0.01, 0.035)
            paint.tree(self.rng, self.canvas, x, base, tall, self.light, self.mood, TREE)

    def boats(self, top: float, bottom: float) -> None:
        """Boats on the water between two heights, the far ones first and smaller."""
        for depth in np.sort(self.rng.uniform(0.15, 0.95, self.count(1, 3))).tolist():
            size = (0.12 + 0.12 * depth) * self.rng.uniform(0.85, 1.15)
            base = top + max(depth * (bottom - top), 0.06)
            sail = self.rng.random() < 0.35
            paint.boat(self.rng, self.canvas, self.across(), base, size, sail, BOAT)

    def finish(self) -> NDArray[np.uint8]:
        """Light, vignette and grain over everything; (H, W, 3) uint8."""
        canvas, rgb = self.canvas, self.canvas.rgb
        u = canvas.x / canvas.width - 0.5
        v = canvas.y / canvas.height - 0.5
        glow = 1.02 + 0.12 * self.light * u - 0.30 * (u * u + v * v)
        grain = self.rng.standard_normal(canvas.label.shape, dtype=np.float32) * np.float32(0.012)
        tint = paint.shade(self.mood.sun, 1.0) * np.float32(self.rng.uniform(0.92, 1.04))
        rgb *= glow[..., None] * tint
        rgb += grain[..., None]
        return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)


def _sun(scene: _Scene, bottom: float) -> None:
    if scene.rng.random() >= 0.35:
        return
    x, y, r = scene.across(), scene.rng.uniform(0.25, 0.85) * bottom, scene.rng.uniform(0.04, 0.07)
    w = scene.canvas.window(x - 7 * r, y - 7 * r, x + 7 * r, y + 7 * r)
    if w is not None:
        distance = ellipse(w, x, y, r, r)
        halo = smoothstep(-distance, -5 * r, 0.0)
        w.blend(halo * halo * np.float32(0.6), scene.mood.shine)
        w.fill(distance, (1.0, 0.97, 0.88))


def _air_over_earth(scene: _Scene, air: int, earth: int) -> Array:
    """The layout a farm and a coast from above share; returns the line between the two."""
    edge = scene.edge(scene.level(0.38, 0.62), 0.16)
    scene.air(0.0, float(edge.max()), air)
    scene.ground(edge, earth)
    return edge


def _thing_on_earth(scene: _Scene, edge: Array) -> tuple[float, float, float]:
    """Where a boat or a car stands on sand or field: x, base and size."""
    x = scene.across()
    top = scene.at(edge, x)
    base = top + scene.rng.uniform(0.25, 0.7) * (scene.canvas.height - top)
    return x, base, scene.rng.uniform(0.18, 0.26)


def _farm(scene: _Scene) -> None:
    rng, canvas = scene.rng, scene.canvas
    edge = _air_over_earth(scene, SKY, FIELD)
    which = rng.random()  # one draw: tree or building or both, never neither
    if which >= 1 - scene.presence[BUILDING]:
        x = scene.across()
        size = rng.uniform(0.16, 0.26)
        base = scene.at(edge, x) + 0.02
        paint.house(rng, canvas, x, base, size, scene.light, BUILDING)
    if which < scene.presence[TREE]:
        scene.trees(edge, 1, 3, (0.16, 0.32))
    if scene.has(CAR):
        x, base, size = _thing_on_earth(scene, edge)
        paint.car(rng, canvas, x, base, size, CAR)
    if scene.has(BALE):
        scene.bodies(edge, BALE)
    if scene.has(GRASS):
        scene.ground(scene.edge(scene.level(0.88, 0.94), 0.05), GRASS)


def _coast(scene: _Scene) -> None:
    rng, canvas = scene.rng, scene.canvas
    if scene.has(SKY):
        horizon = scene.level(0.2, 0.36)
        scene.air(0.0, horizon, SKY)
        _sun(scene, horizon)
        edge = scene.edge(scene.level(0.56, 0.76), 0.16)
        scene.air(horizon, float(edge.max()), WATER)
        w = canvas.band(horizon - 0.03, horizon + 0.03)
        if w is not None:
            w.unlabel(np.broadcast_to(horizon - w.y, w.label.shape), 0.012)
        scene.ground(edge, SAND)
        scene.boats(horizon, float(edge.min()))
    else:
        edge = _air_over_earth(scene, WATER, SAND)
        scene.boats(0.12, float(edge.min()))
    if rng.random() < _ASHORE:
        x, base, size = _thing_on_earth(scene, edge)
        paint.boat(rng, canvas, x, base, size, False, BOAT)
    if scene.has(ROCK):
        scene.bodies(edge, ROCK)


def _lake(scene: _Scene) -> None:
    rng, canvas = scene.rng, scene.canvas
    if scene.has(SKY):
        bank = scene.edge(scene.level(0.3, 0.42), 0.1)
        scene.air(0.0, float(bank.max()), SKY)
        _sun(scene, float(bank.min()))
        scene.ground(bank, GRASS)
    else:
        bank = scene.edge(scene.level(0.1, 0.2), 0.05)
        scene.ground(np.zeros_like(canvas.x) - 0.1, GRASS)
    shore = scene.edge(float(bank.mean()) + 0.07, 0.03)
    near = scene.edge(scene.level(0.74, 0.88), 0.14)
    _pool(scene, shore, float(near.max()))
    if scene.has(BUILDING):
        x = scene.across()
        base = scene.at(bank, x) + 0.03
        paint.house(rng, canvas, x, base, rng.uniform(0.14, 0.22), scene.light, BUILDING)
    scene.trees(bank, 3, 8, (0.12, 0.28))
    if scene.has(BOAT):
        scene.boats(float(shore.max()), float(near.min()))
    scene.ground(near, GRASS)
    if scene.has(ROCK):
        scene.bodies(near, ROCK)


def _pool(scene: _Scene, shore: Array, bottom: float) -> None:
    """Water from ``shore`` down to a height."""
    top = float(shore.min())
    w = scene.canvas.band(top, bottom)
    if w is not None:
        w.fill(shore - w.y, paint.air(scene.rng, w, top, bottom, scene.mood), WATER)
        w.unlabel(shore - w.y, 0.012)


def _street(scene: _Scene) -> None:
    rng, canvas = scene.rng, scene.canvas
    base = scene.level(0.52, 0.62)
    scene.air(0.0, base, SKY)
    _sun(scene, 0.6 * base)
    _skyline(scene, base, (0.6, 0.95), haze=0.45)
    _skyline(scene, base, (0.3, 0.75), haze=0.0)
    level = np.full_like(canvas.x, base)
    if scene.has(GRASS):
        scene.ground(level, GRASS)
        level = level + np.float32(rng.uniform(0.05, 0.09))
    _carriageway(scene, float(level[0, 0]))
    if scene.has(TREE):
        scene.trees(level - 0.03, 1, 3, (0.2, 0.34))
    if scene.has(CAR):
        kerb = float(level[0, 0]) + 0.06
        for depth in np.sort(rng.uniform(0.25, 0.85, scene.count(1, 3))).tolist():
            y = kerb + depth * (canvas.height - kerb)
            paint.car(rng, canvas, scene.across(), y, 0.2 + 0.16 * depth, CAR)


def _skyline(scene: _Scene, base: float, tall: tuple[float, float], haze: float) -> None:
    """A row of buildings standing on ``base``, their height given as a share of the sky's."""
    x = -scene.rng.uniform(0.0, 0.1)
    while x < scene.canvas.width:
        wide = scene.rng.uniform(0.13, 0.27)
        top = base * (1 - scene.rng.uniform(*tall))
        paint.building(scene.rng, scene.canvas, x, x + wide, top, base, scene.light, BUILDING)
        w = scene.canvas.window(x, top, x + wide, base)
        if haze and w is not None:
            w.blend(np.float32(haze) * (w.label == BUILDING), scene.mood.light)
        x += wide + (scene.rng.uniform(0.0, 0.12) if scene.rng.random() < 0.4 else 0.0)


def _carriageway(scene: _Scene, top: float) -> None:
    """Pavement, kerb and a road with dashes, from ``top`` to the bottom; all of class road."""
    rng, canvas = scene.rng, scene.canvas
    w = canvas.band(top, canvas.height)
    if w is None:
        return
    _stone(rng, w, top, 0.62, 0.74)
    w.unlabel(np.broadcast_to(top - w.y, w.label.shape), 0.012)
    kerb = top + 0.06
    w = canvas.band(kerb, canvas.height)
    if w is None:
        return
    _stone(rng, w, kerb, 0.36, 0.46)
    w.blend(w.coverage(np.abs(w.y - kerb) - 0.006 + 0 * w.x), (0.80, 0.79, 0.76))
    middle = kerb + 0.42 * (canvas.height - kerb)
    dash = np.abs((w.x / 0.24 + rng.random()) % 1 - 0.5) * 0.24 - 0.065
    w.fill(np.maximum(dash, np.abs(w.y - middle) - 0.009), (0.93, 0.91, 0.84), opacity=0.9)


def _stone(rng: np.random.Generator, w: Window, top: float, dark: float, pale: float) -> None:
    """Grey, grained: the ground of streets."""
    tone = noise(rng, w.x, w.y, 3.0, 9.0, octaves=2) + 0.4 * (
        noise(rng, w.x, w.y, 60.0, 60.0) - 0.5
    )
    grey = mix((dark, dark, dark * 1.05), (pale, pale, pale * 1.02), tone)
    w.fill(np.broadcast_to(top - w.y, w.label.shape), grey, ROAD)
