"""Adaptive pyramid context."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.rows import rows, to_map


class APCNet(nn.Module):
    """Adaptive pyramid context network (CVPR 2019).

    Conv3x3-BN-ReLU on the concatenation of the input and one :class:`AdaptiveContext` per scale.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of each context and of the result.
        pool_scales: regions per side; one context for each.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w). Allocates the concatenation
    (B, in_channels + len(pool_scales) * out_channels, h, w).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, pool_scales: Sequence[int] = (1, 2, 3, 6)
    ) -> None:
        super().__init__()
        self.contexts = nn.ModuleList(
            AdaptiveContext(in_channels, out_channels, s) for s in pool_scales
        )
        self.fuse = conv_bn_relu(in_channels + len(pool_scales) * out_channels, out_channels, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.fuse(torch.cat([features, *(c(features) for c in self.contexts)], dim=1))


class AdaptiveContext(nn.Module):
    """Every pixel weighs s x s regions of the image with its own affinities (sigmoids).

    The result is F(relu(x + R(sigmoid(A(x + g)) y))), where x is the reduced map, y the reduced
    means of the regions and g a convolution of the mean of x over the image. Allocates s^2
    affinities per pixel.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        pool_scale: s.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, pool_scale: int) -> None:
        super().__init__()
        self.reduce_regions = conv_bn_relu(in_channels, out_channels, 1)
        self.reduce = conv_bn_relu(in_channels, out_channels, 1)
        self.global_information = conv_bn_relu(out_channels, out_channels, 1)
        self.affinity = nn.Conv2d(out_channels, pool_scale**2, 1)  # A
        self.residual = conv_bn_relu(out_channels, out_channels, 1)  # R
        self.fuse = conv_bn_relu(out_channels, out_channels, 1)  # F
        self.pool_scale = pool_scale

    def forward(self, features: Tensor) -> Tensor:
        regions = rows(self.reduce_regions(F.adaptive_avg_pool2d(features, self.pool_scale)))
        x = self.reduce(features)
        information = self.global_information(F.adaptive_avg_pool2d(x, 1))
        affinity = rows(self.affinity(x + information)).sigmoid()  # (B, N, s*s)
        context = self.residual(to_map(affinity @ regions, x))
        return self.fuse(context + x)  # no relu needed: neither summand is negative
