"""What the moving scenes show: a world in layers, and a camera that looks at it.

The world is drawn only from the video's random numbers and does not depend on the frame: regions,
things that stand and things that move, each a layer with its own random stream, painted back to
front by the painters of the still scenes. A frame shows the world at one time, from the camera's
position and with its zoom at that time, so any frame can be drawn without the others. Lengths are
in the units of `canvas`: the shorter side of the view at zoom 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.base import IGNORE_INDEX
from mcibi_fast.data.synthetic import objects as paint
from mcibi_fast.data.synthetic.canvas import Array, Canvas, Window, smoothstep
from mcibi_fast.data.synthetic.scenes import BOAT, BUILDING, CAR, GRASS, PRESENCE, TREE

MARGIN = 0.5  # how far the world extends beyond what the resting camera sees
_TURN = 0.32  # how far out, and out of sight, moving things return on the other side
FAR = 9.0  # beyond any picture

Generator = np.random.Generator
# Paints a layer into a view, displaced by (x, y), with its number in place of its class.
Painter = Callable[[Generator, "View", float, float, int], None]


@dataclass(frozen=True)
class Camera:
    """Where the camera looks at a time: the view's middle, and its zoom."""

    x: float
    y: float
    zoom: float


class View(Canvas):
    """A canvas that shows the world through a camera; coordinates are the world's."""

    def __init__(self, height: int, width: int, camera: Camera) -> None:
        super().__init__(height, width)
        self.scale *= camera.zoom  # pixels per unit; height and width stay the world's
        self.left = camera.x - width / 2 / self.scale
        self.top = camera.y - height / 2 / self.scale
        columns, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
        self.x = (self.left + columns / self.scale).astype(np.float32)[None, :]
        self.y = (self.top + rows / self.scale).astype(np.float32)[:, None]

    def window(self, x0: float, y0: float, x1: float, y1: float) -> Window | None:
        rows = self._pixels(y0 - self.top, y1 - self.top, self.label.shape[0])
        columns = self._pixels(x0 - self.left, x1 - self.left, self.label.shape[1])
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return None
        return Window(self, rows, columns)

    def band(self, y0: float, y1: float) -> Window | None:
        return self.window(-FAR, y0, FAR, y1)

    def _pixels(self, low: float, high: float, size: int) -> slice:
        start, stop = int(np.floor(low * self.scale)) - 1, int(np.ceil(high * self.scale)) + 1
        return slice(max(start, 0), min(stop, size))


@dataclass(frozen=True)
class Path:
    """How a thing moves: steadily sideways, returning on the other side; it may bob."""

    x: float
    speed: float  # units per frame
    low: float
    high: float
    bob: float = 0.0
    rate: float = 0.0  # radians per frame
    phase: float = 0.0

    def at(self, time: int) -> tuple[float, float]:
        """Where it is: x, and the displacement of y."""
        x = self.low + (self.x + self.speed * time - self.low) % (self.high - self.low)
        return x, self.bob * float(np.sin(self.rate * time + self.phase))

    def step(self, time: int) -> tuple[float, float]:
        """How far it moves until the next frame (it returns to the other side out of sight)."""
        return self.speed, self.at(time + 1)[1] - self.at(time)[1]


@dataclass(frozen=True)
class Layer:
    label: int
    painter: Painter
    path: Path | None = None


@dataclass(frozen=True)
class Edge:
    """A gently rolling line across the world: its height at x, which is of any shape."""

    level: float
    swing: float
    slope: float
    waves: tuple[tuple[float, float, float], ...]  # amplitude, radians per unit, phase
    middle: float

    def __call__(self, x: Array) -> Array:
        y = np.float32(self.level) + np.float32(self.slope) * (x - np.float32(self.middle))
        for amplitude, rate, phase in self.waves:
            y = y + np.float32(self.swing * amplitude) * np.sin(np.float32(rate) * x + phase)
        return y.astype(np.float32)

    def at(self, x: float) -> float:
        return float(self(np.array([x], np.float32))[0])


class World:
    """The layers of a video, back to front; `moving_layouts` fills it.

    Args:
        rng: the video's random numbers.
        kind: the type of scene, see `scenes.PRESENCE`.
        height, width: of the view at zoom 1, in units.
    """

    def __init__(self, rng: Generator, kind: str, height: float, width: float) -> None:
        self.rng, self.presence = rng, PRESENCE[kind]
        self.height, self.width = height, width
        self.mood = paint.MOODS[rng.integers(len(paint.MOODS))]
        self.light = (-1 if rng.random() < 0.5 else 1) * rng.uniform(0.4, 1.0)
        self.layers: list[Layer] = []
        self._things: list[tuple[float, Layer]] = []

    def has(self, label: int) -> bool:
        return self.rng.random() < self.presence[label]

    def count(self, low: int, high: int) -> int:
        """How many of a thing: low..high in a square view, more in a wide one."""
        return max(round(int(self.rng.integers(low, high + 1)) * self.width), 1)

    def across(self, margin: float = 0.0) -> float:
        return self.rng.uniform(-margin, self.width + margin)

    def level(self, low: float, high: float) -> float:
        return self.rng.uniform(low, high) * self.height

    def edge(self, level: float, swing: float) -> Edge:
        rng = self.rng
        waves = tuple(
            (a, rng.uniform(0.6, 1.4) * f, rng.uniform(0, 2 * np.pi))
            for a, f in ((0.3, 3), (0.12, 8))
        )
        return Edge(level, swing, rng.uniform(-0.3, 0.3) * swing, waves, self.width / 2)

    # --- layers

    def region(self, label: int, painter: Callable[[Generator, View, int], None]) -> None:
        self.layers.append(
            Layer(label, lambda rng, view, _x, _y, number: painter(rng, view, number))
        )

    def air(self, top: float, bottom: float, label: int, below: Edge | None = None) -> None:
        """Sky or water between two heights; below the edge only, where there is one."""

        def painter(rng: Generator, view: View, number: int) -> None:
            w = view.band(-FAR if below is None else float(below(view.x).min()) - 0.02, bottom)
            if w is None:
                return
            colour = paint.air(rng, w, top, bottom, self.mood)
            if below is None:
                w.rgb[:], w.label[:] = colour, number
                return
            w.fill(below(w.x) - w.y, colour, number)
            w.unlabel(below(w.x) - w.y, 0.012)

        self.region(label, painter)

    def ground(self, edge: Edge, label: int) -> None:
        """Everything below the edge: earth, or grass. A pale rim and an unlabelled line mark it."""

        def painter(rng: Generator, view: View, number: int) -> None:
            w = view.band(float(edge(view.x).min()) - 0.05, FAR)
            if w is None:
                return
            distance = edge(w.x) - w.y
            if label == GRASS:
                colour = paint.lawn(rng, w, self.mood)
            else:
                colour = paint.earth(rng, w, edge.level, self.mood)
            w.fill(distance, colour, number)
            rim = smoothstep(-np.abs(distance + 0.01), -0.035, 0.0) * np.float32(0.3)
            w.blend(rim, self.mood.shine)
            w.unlabel(distance, 0.012)

        self.region(label, painter)

    def thing(self, depth: float, label: int, painter: Painter, path: Path | None = None) -> None:
        """Something that stands or moves in front of all layers so far; the deeper the nearer."""
        self._things.append((depth, Layer(label, painter, path)))

    def stand(self) -> None:
        """Puts the things into the picture, the far ones first."""
        self.layers += [layer for _, layer in sorted(self._things, key=lambda pair: pair[0])]
        self._things = []

    # --- things

    def path(self, slowest: float, fastest: float, bob: float = 0.0) -> Path:
        rng, low, high = self.rng, -_TURN, self.width + _TURN
        speed = rng.uniform(slowest, fastest) * (-1 if rng.random() < 0.5 else 1)
        rate, phase = rng.uniform(0.15, 0.5), rng.uniform(0, 2 * np.pi)
        return Path(self.across(0.1), speed, low, high, bob, rate, phase)

    def trees(self, edge: Edge, low: int, high: int, size: tuple[float, float]) -> None:
        for _ in range(self.count(low, high)):
            x, tall = self.across(MARGIN / 2), self.rng.uniform(*size)
            base = edge.at(x) + self.rng.uniform(0.01, 0.035)
            self.tree(x, base, tall)

    def tree(self, x: float, base: float, tall: float) -> None:
        def painter(rng: Generator, view: View, _x: float, _y: float, number: int) -> None:
            paint.tree(rng, view, x, base, tall, self.light, self.mood, number)

        self.thing(base, TREE, painter)

    def house(self, x: float, base: float, size: float) -> None:
        def painter(rng: Generator, view: View, _x: float, _y: float, number: int) -> None:
            paint.house(rng, view, x, base, size, self.light, number)

        self.thing(base, BUILDING, painter)

    def bodies(self, edge: Edge, label: int) -> None:
        """Boulders below the edge, the far ones smaller."""
        for _ in range(self.count(1, 4)):
            x, depth = self.across(MARGIN / 2), self.rng.uniform(0.15, 0.95)
            base = edge.at(x) + depth * (self.height - edge.at(x))
            r = (0.035 + 0.075 * depth) * self.rng.uniform(0.8, 1.2)
            self.thing(base, label, partial(self._boulder, x, base, r))

    def _boulder(
        self, x: float, base: float, r: float,
        rng: Generator, view: View, _x: float, _y: float, number: int,
    ) -> None:  # fmt: skip
        paint.boulder(rng, view, x, base, r, self.light, self.mood, number)

    def boats(self, top: float, bottom: float) -> None:
        """Boats that sail between two heights and bob, the far ones smaller and slower."""
        for _ in range(self.count(1, 3)):
            depth = self.rng.uniform(0.15, 0.95)
            size = (0.12 + 0.12 * depth) * self.rng.uniform(0.85, 1.15)
            base = top + max(depth * (bottom - top), 0.06)
            path = self.path(0.006 + 0.008 * depth, 0.016 + 0.014 * depth, bob=0.05 * size)
            self.thing(base, BOAT, partial(_boat, base, size, self.rng.random() < 0.35), path)

    def boat_ashore(self, edge: Edge) -> None:
        x = self.across()
        base = edge.at(x) + self.rng.uniform(0.25, 0.7) * (self.height - edge.at(x))
        path = Path(x, 0.0, -MARGIN, self.width + MARGIN)
        self.thing(base, BOAT, partial(_boat, base, self.rng.uniform(0.18, 0.26), False), path)

    def car(self, base: float, size: float, path: Path) -> None:
        self.thing(base, CAR, partial(_car, base, size), path)


def _boat(
    base: float, size: float, sail: bool,
    rng: Generator, view: View, x: float, y: float, number: int,
) -> None:  # fmt: skip
    paint.boat(rng, view, x, base + y, size, sail, number)


def _car(
    base: float, size: float, rng: Generator, view: View, x: float, y: float, number: int
) -> None:
    paint.car(rng, view, x, base + y, size, number)


def paint_world(view: View, world: World, seeds: tuple[int, ...], time: int) -> None:
    """Paints every layer at a time; ``view.label`` then holds layer numbers, 255 between them."""
    for number, layer in enumerate(world.layers):
        x, y = (0.0, 0.0) if layer.path is None else layer.path.at(time)
        layer.painter(np.random.default_rng((*seeds, number)), view, x, y, number)


def classes(world: World) -> NDArray[np.uint8]:
    """(256,): the class of each layer number, 255 of the others."""
    table = np.full(256, IGNORE_INDEX, np.uint8)
    table[: len(world.layers)] = [layer.label for layer in world.layers]
    return table


def steps(world: World, time: int) -> NDArray[np.float64]:
    """(256, 2): how far each layer moves from ``time`` to the next frame, x and y in units."""
    table = np.zeros((256, 2))
    for number, layer in enumerate(world.layers):
        if layer.path is not None:
            table[number] = layer.path.step(time)
    return table
