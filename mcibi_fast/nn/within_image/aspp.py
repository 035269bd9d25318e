"""Atrous spatial pyramid pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.nn.blocks import conv_bn_relu, separable_conv


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (DeepLabV3).

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of each branch and of the result.
        dilations: one branch for each; dilation 1 is a 1x1 convolution. One more branch holds the
            mean over the image.
        separable: depthwise separable 3x3 convolutions in the branches (DeepLabV3+).
        align_corners: whether the resizing of that branch aligns corners.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dilations: Sequence[int] = (1, 12, 24, 36),
        separable: bool = False,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            separable_conv(in_channels, out_channels, dilation=d)
            if separable and d != 1
            else conv_bn_relu(in_channels, out_channels, 1 if d == 1 else 3, dilation=d)
            for d in dilations
        )
        self.global_branch = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), *conv_bn_relu(in_channels, out_channels, 1)
        )
        self.bottleneck = conv_bn_relu((len(dilations) + 1) * out_channels, out_channels, 3)
        self.align_corners = align_corners

    def forward(self, features: Tensor) -> Tensor:
        pooled = F.interpolate(
            self.global_branch(features),
            features.shape[2:],
            mode="bilinear",
            align_corners=self.align_corners,
        )
        branches = [branch(features) for branch in self.branches]
        return self.bottleneck(torch.cat([*branches, pooled], dim=1))
