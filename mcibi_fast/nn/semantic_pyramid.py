"""The feature pyramid of SemanticFPN and PointRend."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.context import resize


class SemanticPyramid(nn.Module):
    """A feature pyramid (arXiv 1612.03144) and the sum of its maps at the finest size.

    Top-down sums of Conv1x1-BN-ReLU on each map, resized to the nearest pixel; Conv3x3-BN-ReLU on
    each sum; on each of these as many Conv3x3-BN-ReLU, each followed by twice the size, as lead
    from its stride to the finest one (one without resizing on the finest map). Their results are
    added up.

    Args:
        in_channels: channels of the maps, finest first.
        pyramid_channels: channels of the pyramid.
        channels: channels of the sum.
        strides: strides of the maps.
        align_corners: whether bilinear resizing aligns corners.

    Shape: maps, finest first -> the sum (B, channels, h0, w0) and the pyramid's finest map
        (B, pyramid_channels, h0, w0).

    Raises:
        ValueError: not one stride for each map.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        pyramid_channels: int,
        channels: int,
        *,
        strides: Sequence[int],
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        if len(strides) != len(in_channels):
            raise ValueError(
                f"strides: expected one for each of the {len(in_channels)} maps, got {strides}"
            )
        self.laterals = nn.ModuleList(conv_bn_relu(c, pyramid_channels, 1) for c in in_channels)
        self.outputs = nn.ModuleList(
            conv_bn_relu(pyramid_channels, pyramid_channels, 3) for _ in in_channels
        )
        self.heads = nn.ModuleList(
            _ScaleHead(
                pyramid_channels, channels, round(math.log2(stride / strides[0])), align_corners
            )
            for stride in strides
        )
        self.align_corners = align_corners

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        maps = [lateral(f) for lateral, f in zip(self.laterals, features, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            above = F.interpolate(maps[i], maps[i - 1].shape[2:], mode="nearest")
            maps[i - 1] = maps[i - 1] + above
        maps = [output(m) for output, m in zip(self.outputs, maps, strict=True)]
        total, *others = (head(m) for head, m in zip(self.heads, maps, strict=True))
        for other in others:
            total = total + resize(other, total.shape[2:], self.align_corners)
        return total, maps[0]


class _ScaleHead(nn.ModuleList):
    """Conv3x3-BN-ReLU and twice the size, ``doublings`` times; without, the convolution alone."""

    def __init__(
        self, in_channels: int, channels: int, doublings: int, align_corners: bool
    ) -> None:
        super().__init__(
            conv_bn_relu(channels if i else in_channels, channels, 3)
            for i in range(max(doublings, 1))
        )
        self.doublings = doublings
        self.align_corners = align_corners

    def forward(self, features: Tensor) -> Tensor:
        for block in self:
            features = block(features)
            if self.doublings:
                features = F.interpolate(
                    features, scale_factor=2.0, mode="bilinear", align_corners=self.align_corners
                )
        return features
