"""How the released code prepares a test image: OpenCV's arithmetic on bytes, without OpenCV."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = 11  # of OpenCV's weights, which are integers


def released_sides(
    sides: Sequence[int],
    size: tuple[int, int] | None,
    short_side: int | None,
    long_side: int | None,
) -> list[int]:
    """The sides of the resized image; they are rounded half up.

    Args:
        sides: (height, width) of the image.
        size, short_side, long_side: see `EvalTransform`; the longer side of ``size`` becomes the
            image's longer side, whichever that is.
    """
    height, width = sides
    if size is not None:
        return sorted(size, reverse=height > width)
    if short_side is None:
        return [height, width]
    factor = short_side / min(sides)
    if long_side is not None:
        least, most = sorted((short_side, long_side))
        factor = min(most / max(sides), least / min(sides))
    return [max(int(side * factor + 0.5), 1) for side in sides]


def released_resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """uint8 (..., H, W) -> (..., h, w): each byte is what ``cv2.resize`` gives (bilinear).

    Each output is a mean of the four nearest pixels, however much smaller the image becomes. The
    weights have 11 bits, and the sum of each row's two products loses 4 bits before the rows are
    weighted.
    """
    height, width = size
    x, wx = _taps(image.shape[-1], width, image.device)
    # At the left and right edge one pixel has the whole weight; the rows' weights stay two.
    wx[1] = wx[1].where((x[0] >= 0) & (x[0] < image.shape[-1] - 1), 0)
    wx[0] = wx[0].where(wx[1] > 0, 2**_BITS)
    left, right = x.clamp(0, image.shape[-1] - 1)
    y, wy = _taps(image.shape[-2], height, image.device)
    top, bottom = y.clamp(0, image.shape[-2] - 1)
    wide = image.int()
    rows = (wide[..., left] * wx[0]).add_(wide[..., right] * wx[1]) >> 4
    mean = ((rows[..., top, :] * wy[0, :, None]) >> 16) + (
        (rows[..., bottom, :] * wy[1, :, None]) >> 16
    )
    return ((mean + 2) >> 2).clamp(0, 255).to(torch.uint8)


def released_normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (..., 3, H, W) -> float32, (image - 255 mean) * (1 / (255 std)), rounded as by OpenCV.

    The subtraction is in float32, the product in float64.
    """
    m = torch.tensor([255 * value for value in mean], dtype=torch.float32).view(3, 1, 1)
    s = torch.tensor([1 / (255 * value) for value in std], dtype=torch.float64).view(3, 1, 1)
    return image.float().sub_(m.to(image.device)).double().mul_(s.to(image.device)).float()


def _taps(source: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each output position two neighbouring positions, the first from -1 on, and weights (2, n).

    The positions are computed in float64 and rounded to float32, as in OpenCV.
    """
    at = ((torch.arange(size, dtype=torch.float64) + 0.5) * (1 / (size / source)) - 0.5).float()
    first = at.floor()
    fraction = at - first
    weights = torch.stack([1 - fraction, fraction]).mul_(2**_BITS).round_().int()
    return torch.stack([first, first + 1]).long().to(device), weights.to(device)
