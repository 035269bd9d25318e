"""The layouts of the moving scenes, one per type, after those of the still scenes."""

from __future__ import annotations

from functools import partial

import numpy as np

from mcibi_fast.data.synthetic import objects as paint
from mcibi_fast.data.synthetic.canvas import Window, mix, noise
from mcibi_fast.data.synthetic.moving_world import FAR, MARGIN, Edge, Generator, View, World
from mcibi_fast.data.synthetic.scenes import (
    BALE,
    BOAT,
    BUILDING,
    CAR,
    FIELD,
    GRASS,
    ROAD,
    ROCK,
    SAND,
    SKY,
    TREE,
    WATER,
)


def build(rng: Generator, kind: str, height: float, width: float) -> World:
    """The world of a video: its type of scene, and the view's height and width in units."""
    world = World(rng, kind, height, width)
    {"street": _street, "coast": _coast, "farm": _farm, "lake": _lake}[kind](world)
    world.stand()
    return world


def _farm(world: World) -> None:
    rng = world.rng
    edge = _air_over_earth(world, SKY, FIELD)
    which = rng.random()  # one draw: tree or building or both, never neither
    if which >= 1 - world.presence[BUILDING]:
        x = world.across()
        world.house(x, edge.at(x) + 0.02, rng.uniform(0.16, 0.26))
    if which < world.presence[TREE]:
        world.trees(edge, 1, 3, (0.16, 0.32))
    if world.has(CAR):
        base = edge.level + rng.uniform(0.3, 0.7) * (world.height - edge.level)
        world.car(base, rng.uniform(0.18, 0.26), world.path(0.012, 0.03))
    if world.has(BALE):
        world.bodies(edge, BALE)
    world.stand()
    if world.has(GRASS):
        world.ground(world.edge(world.level(0.88, 0.94), 0.05), GRASS)


def _coast(world: World) -> None:
    rng = world.rng
    if world.has(SKY):
        horizon = world.level(0.2, 0.36)
        edge = world.edge(world.level(0.56, 0.76), 0.16)
        world.air(0.0, horizon, SKY)
        line = Edge(horizon, 0.0, 0.0, (), 0.0)
        world.air(horizon, edge.level + 0.2, WATER, below=line)
        top = horizon
    else:
        edge = world.edge(world.level(0.38, 0.62), 0.16)
        world.air(0.0, edge.level + 0.2, WATER)
        top = 0.12
    world.ground(edge, SAND)
    world.boats(top, edge.level - 0.06)
    if rng.random() < 0.3:
        world.boat_ashore(edge)
    if world.has(ROCK):
        world.bodies(edge, ROCK)


def _air_over_earth(world: World, air: int, earth: int) -> Edge:
    edge = world.edge(world.level(0.38, 0.62), 0.16)
    world.air(0.0, edge.level + 0.2, air)
    world.ground(edge, earth)
    return edge


def _lake(world: World) -> None:
    rng = world.rng
    if world.has(SKY):
        bank = world.edge(world.level(0.3, 0.42), 0.1)
        world.air(0.0, bank.level + 0.1, SKY)
        world.ground(bank, GRASS)
    else:
        bank = world.edge(world.level(0.1, 0.2), 0.05)
        world.ground(Edge(-FAR, 0.0, 0.0, (), 0.0), GRASS)
    shore = world.edge(bank.level + 0.09, 0.03)
    near = world.edge(world.level(0.74, 0.88), 0.14)
    world.air(shore.level, near.level + 0.15, WATER, below=shore)
    if world.has(BUILDING):
        x = world.across()
        world.house(x, bank.at(x) + 0.03, rng.uniform(0.14, 0.22))
    world.trees(bank, 3, 8, (0.12, 0.28))
    if world.has(BOAT):
        world.boats(shore.level + 0.03, near.level - 0.05)
    world.stand()
    world.ground(near, GRASS)
    if world.has(ROCK):
        world.bodies(near, ROCK)
    if rng.random() < 0.5:  # a tree close by, that boats pass behind
        world.tree(world.across(), near.level + 0.12, rng.uniform(0.4, 0.6))


def _street(world: World) -> None:
    rng = world.rng
    base = world.level(0.52, 0.62)
    world.air(0.0, base, SKY)
    _skyline(world, base, (0.6, 0.95), haze=0.45)
    _skyline(world, base, (0.3, 0.75), haze=0.0)
    level = base
    if world.has(GRASS):
        world.ground(Edge(base, 0.0, 0.0, (), 0.0), GRASS)
        level += rng.uniform(0.05, 0.09)
    world.region(ROAD, partial(_carriageway, level, world.height))
    kerb = level + 0.06
    if world.has(TREE):
        world.trees(Edge(level - 0.03, 0.0, 0.0, (), 0.0), 1, 3, (0.2, 0.34))
    if world.has(CAR):
        for _ in range(world.count(1, 3)):
            depth = rng.uniform(0.25, 0.85)
            y = kerb + depth * (world.height - kerb)
            world.car(y, 0.2 + 0.16 * depth, world.path(0.012, 0.04))
    if rng.random() < 0.4:  # a tree on this side, that cars pass behind
        world.tree(world.across(), world.height + 0.02, rng.uniform(0.45, 0.6))


def _skyline(world: World, base: float, tall: tuple[float, float], haze: float) -> None:
    """A row of buildings standing on ``base``, their height given as a share of the sky's."""
    rng = world.rng
    x = -MARGIN - rng.uniform(0.0, 0.1)
    while x < world.width + MARGIN:
        wide = rng.uniform(0.13, 0.27)
        top = base * (1 - rng.uniform(*tall))
        block = partial(_block, world, x, x + wide, top, base, haze)
        world.region(BUILDING, block)
        x += wide + (rng.uniform(0.0, 0.12) if rng.random() < 0.4 else 0.0)


def _block(
    world: World, x0: float, x1: float, top: float, base: float, haze: float,
    rng: Generator, view: View, number: int,
) -> None:  # fmt: skip
    paint.building(rng, view, x0, x1, top, base, world.light, number)
    w = view.window(x0, top, x1, base) if haze else None
    if w is not None:
        w.blend(np.float32(haze) * (w.label == number), world.mood.light)


def _carriageway(top: float, height: float, rng: Generator, view: View, number: int) -> None:
    """Pavement, kerb and a road with dashes, from ``top`` down; all of class road."""
    phase, kerb = rng.random(), top + 0.06
    w = view.band(top, FAR)
    if w is None:
        return
    _stone(rng, w, top, 0.62, 0.74, number)
    w.unlabel(np.broadcast_to(top - w.y, w.label.shape), 0.012)
    w = view.band(kerb, FAR)
    if w is None:
        return
    _stone(rng, w, kerb, 0.36, 0.46, number)
    w.blend(w.coverage(np.abs(w.y - kerb) - 0.006 + 0 * w.x), (0.80, 0.79, 0.76))
    middle = kerb + 0.42 * (height - kerb)
    dash = np.abs((w.x / 0.24 + phase) % 1 - 0.5) * 0.24 - 0.065
    w.fill(np.maximum(dash, np.abs(w.y - middle) - 0.009), (0.93, 0.91, 0.84), opacity=0.9)


def _stone(rng: Generator, w: Window, top: float, dark: float, pale: float, number: int) -> None:
    tone = noise(rng, w.x, w.y, 3.0, 9.0, octaves=2) + 0.4 * (
        noise(rng, w.x, w.y, 60.0, 60.0) - 0.5
    )
    grey = mix((dark, dark, dark * 1.05), (pale, pale, pale * 1.02), tone)
    w.fill(np.broadcast_to(top - w.y, w.label.shape), grey, number)
