"""Points of a map: sampling at them, random ones, and those where a prediction is uncertain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mcibi_fast.nn.transient import TransientTensors
from mcibi_fast.ops.recompute import once


def sample_points(
    features: Tensor, points: Tensor, *, mode: str = "bilinear", align_corners: bool = False
) -> Tensor:
    """The values of a map at points, zero outside the map.

    Args:
        features: (B, C, h, w). Maps in 16 bits are sampled in float32.
        points: (B, P, 2), x and y in 0..1 in float32: from the left and upper edge of the map to
            the right and lower one.
        mode: "bilinear" or "nearest".
        align_corners: as in ``torch.nn.functional.grid_sample``.

    Returns:
        (B, C, P) in the dtype of the features.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    grid = (2 * points - 1).to(wide)[:, :, None]
    found = F.grid_sample(features.to(wide), grid, mode=mode, align_corners=align_corners)
    return found[..., 0].to(features.dtype)


def uncertainty(logits: Tensor) -> Tensor:
    """The second largest logit minus the largest: (B, K, ...) -> (B, ...), at most 0."""
    first, second = logits.topk(2, dim=1).values.unbind(1)
    return second - first


def cell_centres(indices: Tensor, size: torch.Size) -> Tensor:
    """The centres of cells of a map of this size: indices (B, P) -> points (B, P, 2), float32."""
    height, width = size
    places = ((indices % width, width), (indices // width, height))
    return torch.stack([at.float() * (1 / side) + 0.5 / side for at, side in places], dim=2)


class RandomPoints(TransientTensors):
    """Uniform random points that depend on a seed, the training step, and nothing else.

    They are the same on every device; no generator is seeded or drawn from.

    Args:
        seed: other points for another seed.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._hold("state", torch.tensor([seed, 0], device="cpu"))

    @torch.no_grad()
    def forward(self, batch: int, count: int, device: torch.device) -> Tensor:
        """Points (batch, count, 2) in 0..1, float32. In training the next call gives others."""
        state = self._held("state", device)
        start = _mixed(state[0]) + _mixed(state[1] + 1)
        numbers = _mixed(start + torch.arange(batch * count * 2, device=device))
        if self.training:
            state.copy_(once(torch.stack([state[0], state[1] + 1]), state))
        # The 24 upper bits, as many as float32 has.
        return (((numbers >> 40) & 0xFFFFFF).float() / 2**24).view(batch, count, 2)


def _mixed(numbers: Tensor) -> Tensor:
    """The numbers of SplitMix64 at these positions, int64."""
    x = numbers * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
