"""Warping of maps by optical flow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def warp(maps: Tensor, flow: Tensor) -> Tensor:
    """maps[p + flow(p)], bilinear, 0 outside; without motion the maps themselves.

    Args:
        maps: (B, C, h, w), of another frame.
        flow: (B, 2, h, w), x and y in pixels of the maps, from this frame to the other.

    Returns:
        (B, C, h, w), in the dtype of the maps.
    """
    height, width = maps.shape[2:]
    # bfloat16 cannot tell neighbouring pixels of a large map apart.
    dtype = torch.promote_types(maps.dtype, torch.float32)
    flow = flow.to(dtype)
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    warped = F.grid_sample(maps.to(dtype), grid, padding_mode="zeros", align_corners=False)
    return warped.to(maps.dtype)
