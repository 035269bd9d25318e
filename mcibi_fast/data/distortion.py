"""Photometric distortion of a crop; its colours stay floats from the first change to the last."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# The strengths that are usual for photometric distortion: 32/255 of brightness, half the contrast
# and saturation, 18 degrees of hue; each with probability 1/2.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32 / 255, 0.5, 0.5, 18 / 360
_GREY = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision rounds it


class Distortion(NamedTuple):
    """Factors of brightness, contrast and saturation, and a turn of the hue as a share of a circle.

    None leaves a property as it is. They change in this order, except that contrast comes last
    unless ``contrast_first``.
    """

    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None
    contrast_first: bool = False


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Changes brightness, contrast, saturation and hue, each or not; contrast first or last."""
    # All numbers are drawn, whether used or not, so that one decision does not change the others.
    brightness, contrast, saturation, hue, contrast_first = rng.random(5) < 0.5
    brighter = 1 + _BRIGHTNESS * rng.uniform(-1, 1)
    harder = 1 + _CONTRAST * rng.uniform(-1, 1)
    richer = 1 + _SATURATION * rng.uniform(-1, 1)
    turn = _HUE * rng.uniform(-1, 1)
    return Distortion(
        brighter if brightness else None,
        harder if contrast else None,
        richer if saturation else None,
        turn if hue else None,
        bool(contrast_first),
    )


def distort(planes: Tensor, distortion: Distortion) -> None:
    """Changes the colours (3, H, W) float32, 0 to 255, in place."""
    brightness, contrast, saturation, hue, contrast_first = distortion
    if brightness is not None:
        planes.mul_(brightness).clamp_(max=255)
    if contrast is not None and contrast_first:
        _adjust_contrast(planes, contrast)
    if saturation is not None:
        grey = _grey(planes)
        torch.lerp(grey, planes, saturation, out=planes).clamp_(0, 255)
    if hue is not None:
        _turn_hue(planes, hue)
    if contrast is not None and not contrast_first:
        _adjust_contrast(planes, contrast)


def _grey(planes: Tensor) -> Tensor:
    red, green, blue = planes
    return (red * _GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


def _adjust_contrast(planes: Tensor, factor: float) -> None:
    """Moves the colours away from the mean grey value, or towards it."""
    # NumPy's sums do not depend on the number of threads.
    sums = [plane.numpy().sum() for plane in planes]
    grey = float(np.dot(_GREY, np.array(sums, np.float64))) / planes[0].numel()
    planes.mul_(factor).add_(grey * (1 - factor)).clamp_(0, 255)


def _turn_hue(planes: Tensor, turn: float) -> None:
    """Turns the hue by ``turn`` of a circle, -1/6 to 1/6; HSV's saturation and value stay.

    Let V and v be a pixel's largest and smallest colour, C = V - v, and d the turn in sextants. As
    a function of the hue, a colour rises from v to V within a sextant, stays there for two, falls
    within one and stays at v for two. Where on the two flat parts a pixel is, the difference x of
    the two other colours says, which goes from C to -C on them, and is C or -C on the slopes. So
    the turn takes from the colour how far x is beyond +-C (1 - |d|), up to v or V.
    """
    sextants = 6 * turn
    red, green, blue = planes
    most, least = planes.amax(0), planes.amin(0)
    bound = (most - least).mul_(1 - abs(sextants))
    changes = []
    for left, right in ((green, blue), (blue, red), (red, green)):
        x = left - right
        changes.append(x.sub_(torch.clamp(x, -bound, bound)))
    for plane, change in zip(planes, changes, strict=True):
        plane.sub_(change, alpha=1 if turn > 0 else -1)
        torch.clamp(plane, least, most, out=plane)
