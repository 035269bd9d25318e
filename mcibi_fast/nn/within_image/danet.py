"""Dual attention: over positions and over channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.rows import rows, to_map


class DANet(nn.Module):
    """Sum of a branch with position attention and one with channel attention (arXiv 1809.02983).

    Each branch is Conv3x3-BN-ReLU, attention, Conv3x3-BN-ReLU.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of both branches and of the result.
        transform_channels: channels of the queries and keys of the position attention.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, transform_channels: int = 64
    ) -> None:
        super().__init__()
        self.position, self.channel = (
            nn.Sequential(
                conv_bn_relu(in_channels, out_channels, 3),
                attention,
                conv_bn_relu(out_channels, out_channels, 3),
            )
            for attention in (
                PositionAttention(out_channels, transform_channels),
                ChannelAttention(),
            )
        )

    def branches(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The results of the position attention and of the channel attention."""
        return self.position(features), self.channel(features)

    def forward(self, features: Tensor) -> Tensor:
        position, channel = self.branches(features)
        return position + channel


class PositionAttention(nn.Module):
    """x + gamma * softmax(Q K^T) V over all pixels; projections without bias, no scaling.

    The h w x h w scores are not written to memory.

    Args:
        channels: channels of input, value and result.
        transform_channels: channels of queries and keys.

    Shape: (B, channels, h, w) -> the same.
    """

    def __init__(self, channels: int, transform_channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, transform_channels, 1, bias=False)
        self.key = nn.Conv2d(channels, transform_channels, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def reset_parameters(self) -> None:
        """Sets what is not in a submodule as after ``__init__``."""
        nn.init.zeros_(self.gamma)

    def forward(self, features: Tensor) -> Tensor:
        query, key, value = (
            rows(project(features)) for project in (self.query, self.key, self.value)
        )
        context = ops.confidence_attention(query, key, value, scale=1.0)
        return features + self.gamma * to_map(context, features)


class ChannelAttention(nn.Module):
    """x + gamma * softmax(-X X^T) X, where X is the map as a (C, h w) matrix.

    The softmax runs along each row of the C x C scores, which are allocated once per image. The
    sign favours channels that differ, as in the published softmax(max - X X^T).

    Shape: (B, C, h, w) -> the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(()))

    def reset_parameters(self) -> None:
        """Sets what is not in a submodule as after ``__init__``."""
        nn.init.zeros_(self.gamma)

    def forward(self, features: Tensor) -> Tensor:
        X = features.flatten(2)  # (B, C, N)
        attention = (-(X @ X.mT)).softmax(dim=2)  # (B, C, C)
        return features + self.gamma * (attention @ X).view_as(features)
