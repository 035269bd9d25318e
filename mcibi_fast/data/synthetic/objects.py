"""Materials and objects of the built-in scenes.

Where two classes are meant to look alike they are painted by the same function here, which does
not know the class it paints: `air` (sky, water), `earth` (sand, field), `boulder` (rock, bale), and
the paints, glass and dark undersides that cars and boats share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mcibi_fast.data.synthetic.canvas import (
    Array,
    Canvas,
    Window,
    box,
    ellipse,
    mix,
    noise,
    polygon,
    smoothstep,
)

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Mood:
    """The light of a scene: colours in 0..1. Drawn independently of the scene's type."""

    deep: Colour  # air far from its lower edge
    light: Colour  # air at its lower edge, and haze
    shine: Colour  # clouds and glints
    earth_dark: Colour
    earth_light: Colour
    leaf_dark: Colour
    leaf_light: Colour
    sun: Colour  # the light's tint


MOODS = (
    Mood(  # noon
        (0.22, 0.50, 0.80), (0.71, 0.88, 0.94), (0.98, 0.99, 1.00),
        (0.80, 0.65, 0.39), (0.95, 0.85, 0.60), (0.16, 0.38, 0.20), (0.55, 0.72, 0.29),
        (1.00, 0.99, 0.95),
    ),
    Mood(  # lagoon
        (0.10, 0.45, 0.62), (0.63, 0.89, 0.85), (0.96, 1.00, 0.98),
        (0.82, 0.68, 0.46), (0.97, 0.89, 0.70), (0.10, 0.37, 0.28), (0.47, 0.72, 0.36),
        (1.00, 1.00, 0.97),
    ),
    Mood(  # golden hour
        (0.38, 0.47, 0.68), (0.99, 0.80, 0.58), (1.00, 0.91, 0.76),
        (0.76, 0.53, 0.28), (0.96, 0.77, 0.46), (0.25, 0.33, 0.17), (0.67, 0.64, 0.26),
        (1.00, 0.93, 0.82),
    ),
    Mood(  # dusk
        (0.25, 0.24, 0.46), (0.90, 0.58, 0.53), (0.99, 0.76, 0.65),
        (0.50, 0.37, 0.34), (0.77, 0.59, 0.46), (0.14, 0.22, 0.24), (0.37, 0.44, 0.30),
        (0.97, 0.88, 0.90),
    ),
    Mood(  # mist
        (0.50, 0.60, 0.66), (0.84, 0.88, 0.87), (0.95, 0.97, 0.97),
        (0.64, 0.55, 0.40), (0.83, 0.76, 0.61), (0.22, 0.36, 0.30), (0.52, 0.62, 0.44),
        (0.98, 0.99, 1.00),
    ),
)  # fmt: skip

PAINTS: tuple[Colour, ...] = (
    (0.82, 0.22, 0.19), (0.95, 0.93, 0.88), (0.17, 0.36, 0.58),
    (0.93, 0.68, 0.20), (0.18, 0.52, 0.49), (0.29, 0.30, 0.34),
)  # fmt: skip
GLASS: Colour = (0.20, 0.28, 0.35)
UNDERSIDE: Colour = (0.10, 0.11, 0.13)
TRIM: Colour = (0.96, 0.95, 0.91)
FACADES: tuple[Colour, ...] = (
    (0.85, 0.55, 0.42), (0.90, 0.80, 0.66), (0.58, 0.42, 0.42),
    (0.72, 0.68, 0.70), (0.46, 0.54, 0.60), (0.80, 0.66, 0.50),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((0.43, 0.22, 0.20), (0.30, 0.28, 0.34), (0.55, 0.33, 0.24))


def shade(colour: Colour, factor: float) -> Array:
    return np.clip(np.asarray(colour, np.float32) * np.float32(factor), 0, 1)


def air(rng: np.random.Generator, w: Window, top: float, bottom: float, mood: Mood) -> Array:
    """Sky or water between two heights: deep to light downwards, level streaks. (h, w, 3)."""
    t = np.clip((w.y - top) / max(bottom - top, 1e-3), 0, 1)
    wave = noise(rng, w.x, w.y, 2.2, 13.0, octaves=3)
    colour = mix(mood.deep, mood.light, np.clip(t + 0.35 * (wave - 0.5), 0, 1))
    streak = smoothstep(noise(rng, w.x, w.y, 1.6, 9.0, octaves=3), 0.52, 0.78)
    amount = streak * np.float32(rng.uniform(0.35, 0.8))
    return colour + amount[..., None] * (np.asarray(mood.shine, np.float32) - colour)


def earth(rng: np.random.Generator, w: Window, top: float, mood: Mood) -> Array:
    """Sand or a stubble field below a height: drifts that widen towards the viewer. (h, w, 3)."""
    depth = np.sqrt(np.maximum(w.y - top, 0) + 0.02)  # rows crowd towards the horizon
    drift = noise(rng, w.x, depth, 1.4, 11.0, octaves=3)
    grain = noise(rng, w.x, w.y, 45.0, 70.0)
    return mix(mood.earth_dark, mood.earth_light, 0.25 + 0.75 * drift + 0.16 * (grain - 0.5))


def lawn(rng: np.random.Generator, w: Window, mood: Mood) -> Array:
    """Grass: tufts over broad patches of light. (h, w, 3)."""
    patch = noise(rng, w.x, w.y, 2.0, 5.0, octaves=2)
    tuft = noise(rng, w.x, w.y, 40.0, 16.0)
    return mix(mood.leaf_dark, mood.leaf_light, 0.25 + 0.55 * patch + 0.28 * tuft)


def shadow(canvas: Canvas, cx: float, cy: float, rx: float, ry: float, strength: float) -> None:
    """A soft dark ellipse on the ground; it has no label of its own."""
    w = canvas.window(cx - 1.6 * rx, cy - 1.6 * ry, cx + 1.6 * rx, cy + 1.6 * ry)
    if w is not None:
        u, v = (w.x - cx) / rx, (w.y - cy) / ry
        soft = smoothstep(-(u * u + v * v), -1.8, -0.2)
        w.blend(soft * np.float32(strength), (0.08, 0.09, 0.14))


def boulder(
    rng: np.random.Generator, canvas: Canvas, cx: float, base: float, r: float, light: float,
    mood: Mood, label: int,
) -> None:  # fmt: skip
    """A rounded tan body resting at height ``base``: a rock, or a bale of straw."""
    rx, ry = r * rng.uniform(1.0, 1.35), r * rng.uniform(0.78, 0.98)
    cy = base - 0.8 * ry
    shadow(canvas, cx - light * 0.5 * rx, base - 0.05 * ry, 1.25 * rx, 0.34 * ry, 0.45)
    w = canvas.window(cx - 1.3 * rx, cy - 1.3 * ry, cx + 1.3 * rx, base + 0.3 * ry)
    if w is None:
        return
    u, v = (w.x - cx) / rx, (w.y - cy) / ry
    bump = noise(rng, u, v, 1.3, 1.3) - 0.5
    radius = np.sqrt(np.sqrt(u**4 + v**4 + u * u * v * v)) * (1 + 0.22 * bump)
    relief = noise(rng, u, v, 2.6, 4.5, octaves=2) - 0.5
    facing = 0.50 * light * u - 0.75 * v + 0.7 * relief
    body = mix(
        shade(mood.earth_dark, 0.52), shade(mood.earth_light, 0.98), smoothstep(facing, -0.9, 0.9)
    )
    body *= (1 - 0.35 * smoothstep(v, 0.2, 0.95))[..., None]
    w.fill(np.maximum((radius - 1) * ry, w.y - base), body, label)


def tree(
    rng: np.random.Generator, canvas: Canvas, cx: float, base: float, size: float, light: float,
    mood: Mood, label: int,
) -> None:  # fmt: skip
    """A trunk under a crown of lobes, lit from one side."""
    shadow(canvas, cx - light * 0.15 * size, base, 0.42 * size, 0.08 * size, 0.4)
    w = canvas.window(cx - 0.6 * size, base - 1.15 * size, cx + 0.6 * size, base + 0.02)
    if w is None:
        return
    trunk = box(w, cx, base - 0.25 * size, 0.045 * size, 0.25 * size)
    w.fill(trunk, shade((0.36, 0.25, 0.19), 1.0), label)
    lobes = 7
    angle = np.linspace(0, 2 * np.pi, lobes, endpoint=False) + rng.uniform(0, 1)
    spread = rng.uniform(0.16, 0.26, lobes) * size
    tall = rng.uniform(0.85, 1.3)
    x = (cx + spread * np.cos(angle)).astype(np.float32)[:, None, None]
    y = (base - 0.66 * size + tall * spread * np.sin(angle)).astype(np.float32)[:, None, None]
    r = (rng.uniform(0.17, 0.27, lobes) * size).astype(np.float32)[:, None, None]
    dx, dy = (w.x - x) / r, (w.y - y) / r
    lobe = (dx * dx + dy * dy - 1) * r * 0.5  # distance near each lobe's rim
    nearest = lobe.argmin(0)[None]
    ragged = noise(rng, w.x, w.y, 7 / size, 7 / size, octaves=2) - 0.5
    distance = np.take_along_axis(lobe, nearest, 0)[0] + 0.10 * size * ragged
    dx, dy = (np.take_along_axis(d, nearest, 0)[0] for d in np.broadcast_arrays(dx, dy))
    crown = (w.y - (base - 0.66 * size)) / (0.45 * size)
    lit = 0.45 + 0.25 * (light * dx - dy) - 0.28 * crown + 0.55 * ragged
    w.fill(distance, mix(mood.leaf_dark, mood.leaf_light, np.clip(lit, 0, 1)), label)


def building(
    rng: np.random.Generator, canvas: Canvas, x0: float, x1: float, top: float, base: float,
    light: float, label: int,
) -> None:  # fmt: skip
    """A block of flats: rows of windows, a parapet, one side in shade."""
    w = canvas.window(x0, top, x1, base)
    if w is None:
        return
    wall = FACADES[rng.integers(len(FACADES))]
    half = (x1 - x0) / 2
    distance = box(w, (x0 + x1) / 2, (top + base) / 2, half, (base - top) / 2)
    side = (w.x - (x0 + x1) / 2) / half * np.float32(light)
    fall = (w.y - top) / (base - top)
    colour = mix(shade(wall, 0.78), shade(wall, 1.05), smoothstep(side - 0.35 * fall, -1.2, 0.9))
    w.fill(distance, colour, label)
    columns = max(round((x1 - x0) / 0.075), 2)
    floors = max(round((base - top) / 0.085), 2)
    u = (w.x - x0) / (x1 - x0) * columns
    v = (w.y - top - 0.02) / (base - top - 0.02) * floors
    pane_x = (np.abs(u - np.floor(u) - 0.5) - 0.27) * ((x1 - x0) / columns)
    pane_y = (np.abs(v - np.floor(v) - 0.52) - 0.28) * ((base - top) / floors)
    pane = np.maximum(np.maximum(pane_x, pane_y), distance + 0.01)
    warm = rng.random((floors + 1, columns), dtype=np.float32) < 0.22
    lit = warm[np.clip(v.astype(int), 0, floors)[:, 0]][
        :, np.clip(u.astype(int), 0, columns - 1)[0]
    ]
    glass = np.where(lit[..., None], shade((0.98, 0.83, 0.52), 1), shade(GLASS, 1))
    w.fill(pane, glass, opacity=0.85)
    w.fill(np.maximum(distance, w.y - top - 0.014), shade(wall, 0.6))


def house(
    rng: np.random.Generator, canvas: Canvas, cx: float, base: float, size: float, light: float,
    label: int,
) -> None:  # fmt: skip
    """A gabled barn or cabin with a door."""
    shadow(canvas, cx - light * 0.2 * size, base, 0.7 * size, 0.1 * size, 0.35)
    w = canvas.window(cx - 0.6 * size, base - 1.0 * size, cx + 0.6 * size, base)
    if w is None:
        return
    wall = ((0.66, 0.23, 0.19), (0.88, 0.83, 0.74), (0.50, 0.36, 0.28))[rng.integers(3)]
    body = box(w, cx, base - 0.27 * size, 0.5 * size, 0.27 * size)
    planks = 0.92 + 0.16 * noise(rng, w.x, w.y, 28 / size, 0.6)
    w.fill(body, shade(wall, 1) * planks[..., None], label)
    eave, ridge = base - 0.52 * size, base - 0.88 * size
    roof = polygon(
        w,
        [(cx - 0.34 * size, ridge), (cx + 0.34 * size, ridge),
         (cx + 0.58 * size, eave), (cx - 0.58 * size, eave)],
    )  # fmt: skip
    tint = ROOFS[rng.integers(len(ROOFS))]
    w.fill(roof, mix(shade(tint, 1.15), shade(tint, 0.8), (w.y - ridge) / (eave - ridge)), label)
    w.fill(box(w, cx, base - 0.17 * size, 0.11 * size, 0.17 * size), shade(UNDERSIDE, 2.2))
    for dx in (-0.31, 0.31):
        pane = box(w, cx + dx * size, base - 0.3 * size, 0.075 * size, 0.085 * size)
        w.fill(pane - 0.018 * size, TRIM)
        w.fill(pane, GLASS)


def car(
    rng: np.random.Generator, canvas: Canvas, cx: float, base: float, size: float, label: int
) -> None:
    """A car seen from the side, ``size`` long, its wheels on ``base``."""
    shadow(canvas, cx, base, 0.56 * size, 0.07 * size, 0.55)
    w = canvas.window(cx - 0.55 * size, base - 0.5 * size, cx + 0.55 * size, base + 0.02 * size)
    if w is None:
        return
    paint, facing = PAINTS[rng.integers(len(PAINTS))], 1 if rng.random() < 0.5 else -1
    _cabin(w, cx - 0.04 * facing * size, base - 0.28 * size, size, paint, label)
    hull = box(w, cx, base - 0.195 * size, 0.5 * size, 0.105 * size, r=0.075 * size)
    _painted(w, hull, base - 0.30 * size, base - 0.09 * size, paint, label)
    for dx in (-0.30, 0.30):
        wheel = ellipse(w, cx + dx * size, base - 0.085 * size, 0.095 * size, 0.095 * size)
        w.fill(wheel, UNDERSIDE, label)
        w.fill(wheel + 0.055 * size, (0.72, 0.73, 0.75))


def boat(
    rng: np.random.Generator, canvas: Canvas, cx: float, base: float, size: float, sail: bool,
    label: int,
) -> None:  # fmt: skip
    """A boat seen from the side, ``size`` long, its keel at ``base``: a cabin, or a sail."""
    shadow(canvas, cx, base + 0.02 * size, 0.54 * size, 0.08 * size, 0.5)
    height = 1.15 * size if sail else 0.5 * size
    w = canvas.window(cx - 0.6 * size, base - height, cx + 0.6 * size, base + 0.02 * size)
    if w is None:
        return
    paint, facing = PAINTS[rng.integers(len(PAINTS))], 1 if rng.random() < 0.5 else -1
    if sail:
        jib = cx - 0.03 * facing * size
        _sail(w, cx, base - 0.20 * size, 0.9 * size, facing * 0.44 * size, TRIM, label)
        _sail(w, jib, base - 0.24 * size, 0.66 * size, -facing * 0.26 * size, paint, label)
    else:
        _cabin(w, cx - 0.08 * facing * size, base - 0.22 * size, size, paint, label)
    bow, stern = cx + 0.55 * facing * size, cx - 0.48 * facing * size
    corners = [
        (stern, base - 0.23 * size),
        (bow, base - 0.26 * size),
        (bow - 0.17 * facing * size, base),
        (stern + 0.06 * facing * size, base),
    ]
    hull = polygon(w, corners if facing > 0 else corners[::-1])
    _painted(w, hull, base - 0.26 * size, base, paint, label)
    w.fill(np.maximum(hull, base - 0.055 * size - w.y), UNDERSIDE)


def _painted(
    w: Window, distance: Array, top: float, bottom: float, paint: Colour, label: int
) -> None:
    """A painted body, lighter at its upper edge, with a pale stripe."""
    t = np.broadcast_to(np.clip((w.y - top) / (bottom - top), 0, 1), distance.shape)
    w.fill(distance, mix(shade(paint, 1.12), shade(paint, 0.66), t), label)
    stripe = np.abs(w.y - (top + 0.3 * (bottom - top))) - 0.05 * (bottom - top)
    w.fill(np.maximum(distance + 0.1 * (bottom - top), stripe), TRIM, opacity=0.75)


def _cabin(w: Window, cx: float, base: float, size: float, paint: Colour, label: int) -> None:
    """A painted roof over dark glass with one post: the upper part of cars and of boats."""
    top, half_top, half_base = base - 0.17 * size, 0.19 * size, 0.27 * size
    cabin = polygon(
        w,
        [
            (cx - half_top, top),
            (cx + half_top, top),
            (cx + half_base, base + 0.01),
            (cx - half_base, base + 0.01),
        ],
    )
    w.fill(cabin, shade(paint, 0.95), label)
    post = 0.10 * half_base - np.abs(w.x - cx)
    w.fill(np.maximum(cabin + 0.16 * (base - top), post), GLASS)


def _sail(
    w: Window, cx: float, base: float, height: float, reach: float, cloth: Colour, label: int
) -> None:
    corners = [(cx, base - height), (cx + reach, base), (cx, base)]
    sail = polygon(w, corners if reach > 0 else corners[::-1])
    t = np.clip((w.x - cx) / reach, 0, 1) + 0 * w.y
    w.fill(sail, mix(shade(cloth, 1.0), shade(cloth, 0.8), t), label)
