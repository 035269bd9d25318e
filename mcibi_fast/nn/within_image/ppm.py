"""Pyramid pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.nn.blocks import conv_bn_relu


class PPM(nn.Module):
    """Pyramid pooling module (PSPNet, arXiv 1612.01105).

    For every scale s the map is averaged over s x s regions, goes through Conv1x1-BN-ReLU and is
    resized back. The results are concatenated with the map and go through Conv3x3-BN-ReLU.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of each branch and of the result.
        pool_scales: the regions per side; one branch for each.
        align_corners: whether the resizing of the branches aligns corners.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w). Allocates the concatenation
    (B, in_channels + len(pool_scales) * out_channels, h, w).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.pyramid = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(s), *conv_bn_relu(in_channels, out_channels, 1))
            for s in pool_scales
        )
        self.bottleneck = conv_bn_relu(
            in_channels + len(pool_scales) * out_channels, out_channels, 3
        )
        self.align_corners = align_corners

    def forward(self, features: Tensor) -> Tensor:
        return self.bottleneck(self.concatenated(features, self.pool(features)))

    @property
    def branches(self) -> list[Any]:
        """Pooling, convolution, batch norm and ReLU of each scale."""
        return list(self.pyramid)

    def pool(self, features: Tensor) -> list[Tensor]:
        """The means over the regions of each scale, (B, in_channels, s, s)."""
        return [pool(features) for pool, *_ in self.branches]

    def concatenated(self, features: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """The map with what the branches make of the pooled means, before the last convolution."""
        branches = [
            F.interpolate(
                relu(norm(conv(means))),
                features.shape[2:],
                mode="bilinear",
                align_corners=self.align_corners,
            )
            for (_, conv, norm, relu), means in zip(self.branches, pooled, strict=True)
        ]
        return torch.cat([features, *branches], dim=1)
