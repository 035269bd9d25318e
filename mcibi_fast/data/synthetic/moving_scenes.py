"""The built-in videos: the scenes' classes and look-alikes under a moving camera.

The camera pans and zooms; boats and cars move, each at its own pace, and pass behind one another,
behind trees and out of view. In a share of the frames a part of the picture is degraded: blurred,
faded, noisy or covered. Labels do not change with that, so past frames can tell what the frame
itself does not show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcibi_fast import extras
from mcibi_fast.data.base import Transform
from mcibi_fast.data.synthetic import objects as paint
from mcibi_fast.data.synthetic.canvas import Array, smoothstep
from mcibi_fast.data.synthetic.moving_layouts import build
from mcibi_fast.data.synthetic.moving_world import Camera, View, World, classes, paint_world, steps
from mcibi_fast.data.synthetic.scenes import (
    SCENE_TYPES,
    SCENES_CLASSES,
    SCENES_PALETTE,
    TYPE_PROBABILITY,
    Scenes,
)
from mcibi_fast.data.video import VideoDataset

DEGRADATIONS = ("blur", "fade", "noise", "cover")

_SPLITS = {"train": 0, "val": 1, "test": 2}
_VIDEOS = 1_000_003  # keeps the streams of videos apart from those of the still scenes
_WORLD, _LAYERS, _LOOKS, _GRAIN = range(4)


class Degradation(NamedTuple):
    """What is done to a frame: the kind, and the discs (x, y, r) it is done in, in units."""

    kind: str
    discs: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class _Swing:
    """A value that goes up and down: middle + reach * sin(rate * t + phase)."""

    middle: float
    reach: float
    rate: float
    phase: float

    def at(self, time: int) -> float:
        return self.middle + self.reach * float(np.sin(self.rate * time + self.phase))


class MovingScenes(VideoDataset):
    """Procedural videos, 12 classes, each frame drawn from (seed, split, video, frame) alone.

    Args:
        split: "train", "val" or "test"; splits never share a video.
        count: number of videos.
        length: frames of each.
        size: side of the square frames, or (height, width), at least 16.
        seed: of the videos; non-negative.
        degraded: share of frames, but for each video's first, that are degraded.
        transform: see `data.transforms`; None normalises and nothing else.

    Every frame is labelled, uint8 with 255 ignored (thin lines between regions). `flow` is exact.
    Classes, palette, mean and deviation are those of `Scenes`. Raises ValueError for an unknown
    split or arguments out of range.
    """

    mean = Scenes.mean
    std = Scenes.std

    def __init__(
        self,
        split: str,
        *,
        count: int,
        length: int,
        size: int | tuple[int, int],
        seed: int,
        degraded: float = 0.35,
        transform: Transform | None = None,
    ) -> None:
        super().__init__(transform)
        if split not in _SPLITS:
            raise ValueError(f"split: {split!r} is not one of {', '.join(_SPLITS)}")
        self.height, self.width = (size, size) if isinstance(size, int) else size
        if min(self.height, self.width) < 16:
            raise ValueError(f"size: {self.height}x{self.width} is too small, at least 16x16")
        for name, value in (("count", count), ("length", length)):
            if value < 1:
                raise ValueError(f"{name}: {value}, expected at least 1")
        if seed < 0:
            raise ValueError(f"seed: {seed} is negative")
        if not 0 <= degraded <= 1:
            raise ValueError(f"degraded: {degraded} is not in 0..1")
        self.split, self.count, self.length, self.seed = split, count, length, seed
        self.degraded = degraded
        self.classes, self.palette = list(SCENES_CLASSES), SCENES_PALETTE.copy()

    def videos(self) -> list[str]:
        return [f"{self.split}_{video:05d}" for video in range(self.count)]

    def frames(self, video: int) -> int:
        return self.length

    def frame_name(self, video: int, frame: int) -> str:
        return f"{self.split}_{video:05d}_{frame:05d}"

    def scene_type(self, video: int) -> str:
        """The type of a video's scene, one of SCENE_TYPES."""
        return self._start(video)[1]

    def read_frame(self, video: int, frame: int) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """A frame: image (H, W, 3) uint8, label (H, W) uint8."""
        world, view = self._painted(video, frame)
        degradation = self.degradation(video, frame)
        rng = self._generator(video, _GRAIN, frame)
        return _finish(view, world, degradation, rng), classes(world)[view.label]

    def degradation(self, video: int, frame: int) -> Degradation | None:
        """How a frame is degraded; None for a clear frame, such as the first of a video."""
        rng = self._generator(video, _LOOKS, frame)
        if frame == 0 or rng.random() >= self.degraded:
            return None
        kind = DEGRADATIONS[rng.integers(len(DEGRADATIONS))]
        short = min(self.height, self.width)
        discs = tuple(
            (
                rng.uniform(0, self.width / short),
                rng.uniform(0, self.height / short),
                rng.uniform(0.2, 0.4),
            )
            for _ in range(rng.integers(1, 3))
        )
        return Degradation(kind, discs)

    def flow(self, video: int, frame: int) -> NDArray[np.float32]:
        """Exact optical flow from ``frame`` to the next: (2, H, W), x and y in pixels.

        It is that of the surface each pixel shows, whether that is seen in the next frame or not;
        pixels without a label move as the ground does. Raises IndexError at the last frame.
        """
        self._check(video, frame + 1)
        world, view = self._painted(video, frame)
        after = self._view(video, frame + 1)
        moved = steps(world, frame)[view.label]  # (H, W, 2)
        columns = (view.x + moved[..., 0] - after.left) * after.scale - 0.5
        rows = (view.y + moved[..., 1] - after.top) * after.scale - 0.5
        here = np.mgrid[: self.height, : self.width]
        return np.stack([columns - here[1], rows - here[0]]).astype(np.float32)

    def _painted(self, video: int, frame: int) -> tuple[World, View]:
        """The world, and a view of it with layer numbers for labels."""
        rng, kind = self._start(video)
        view = self._view(video, frame)
        world = build(rng, kind, view.height, view.width)
        paint_world(view, world, (*self._seeds(video), _LAYERS), frame)
        return world, view

    def _view(self, video: int, frame: int) -> View:
        height, width = self.height, self.width
        rng, short = self._generator(video, _WORLD, 1), min(height, width)
        x, y, zoom = (
            _Swing(middle, reach, 2 * np.pi / rng.uniform(40, 90), rng.uniform(0, 2 * np.pi))
            for middle, reach in (
                (width / short / 2, rng.uniform(0.05, 0.15)),
                (height / short / 2, rng.uniform(0.0, 0.05)),
                (1.25, rng.uniform(0.0, 0.12)),
            )
        )
        return View(height, width, Camera(x.at(frame), y.at(frame), zoom.at(frame)))

    def _start(self, video: int) -> tuple[np.random.Generator, str]:
        """The video's random numbers, and the type of its scene, which is the first of them."""
        rng = self._generator(video, _WORLD, 0)
        bounds = np.cumsum(TYPE_PROBABILITY[:-1])
        return rng, SCENE_TYPES[int(np.searchsorted(bounds, rng.random(), "right"))]

    def _seeds(self, video: int) -> tuple[int, ...]:
        return self.seed, _SPLITS[self.split], _VIDEOS, video

    def _generator(self, video: int, purpose: int, number: int) -> np.random.Generator:
        return np.random.default_rng((*self._seeds(video), purpose, number))


def _finish(
    view: View, world: World, degradation: Degradation | None, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Light, vignette, degradation and grain over everything; (H, W, 3) uint8."""
    height, width = view.label.shape
    u = ((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5)[None, :]
    v = ((np.arange(height, dtype=np.float32) + 0.5) / height - 0.5)[:, None]
    glow = 1.02 + 0.12 * world.light * u - 0.30 * (u * u + v * v)
    rgb: Array = view.rgb * (glow.astype(np.float32)[..., None] * paint.shade(world.mood.sun, 1.0))
    if degradation is not None:
        rgb = _degrade(rgb, degradation, rng)
    rgb = rgb + rng.standard_normal((height, width), dtype=np.float32)[..., None] * np.float32(
        0.012
    )
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)


def _degrade(rgb: Array, degradation: Degradation, rng: np.random.Generator) -> Array:
    smooth = extras.load("MovingScenes", "scipy.ndimage").uniform_filter
    height, width = rgb.shape[:2]
    short = min(height, width)
    y, x = np.ogrid[:height, :width]
    amount = np.zeros((height, width), np.float32)
    soft = 0.06 if degradation.kind == "cover" else 0.25  # of the disc's rim, as a share of r
    for cx, cy, r in degradation.discs:
        distance = np.hypot((x + 0.5) / short - cx, (y + 0.5) / short - cy) / r
        np.maximum(amount, smoothstep(-distance.astype(np.float32), -1.0, -1.0 + soft), out=amount)
    if degradation.kind == "blur":
        reach = max(round(0.2 * short), 3)
        worse = smooth(smooth(rgb, (reach, reach, 1)), (reach, reach, 1))
    elif degradation.kind == "fade":
        worse = np.float32(0.62) + np.float32(0.06) * (rgb - rgb.mean((0, 1), keepdims=True))
    elif degradation.kind == "noise":
        worse = 0.5 + 0.15 * (rgb - 0.5) + rng.normal(0, 0.3, rgb.shape).astype(np.float32)
    else:
        worse = np.float32(0.16) + np.float32(0.05) * rng.random((height, width, 1), np.float32)
    return (rgb + amount[..., None] * (worse - rgb)).astype(np.float32)
