"""Interlaced sparse self-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.rows import rows, to_map


class ISANet(nn.Module):
    """Interlaced sparse self-attention (arXiv 1907.12273).

    Conv3x3-BN-ReLU; attention among the pixels at equal positions of all blocks, then among the
    pixels of each block; Conv3x3-BN-ReLU on the result and the map before the attentions.

    As in the released code, a map whose sides are no multiples of the blocks' is padded with zeros
    on all sides, and the padded pixels take part in both attentions.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of the attentions and of the result.
        transform_channels: channels of queries and keys.
        block_size: height and width of a block.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        transform_channels: int = 256,
        block_size: tuple[int, int] = (8, 8),
    ) -> None:
        super().__init__()
        self.before = conv_bn_relu(in_channels, out_channels, 3)
        self.far = PixelAttention(out_channels, transform_channels)
        self.near = PixelAttention(out_channels, transform_channels)
        self.fuse = conv_bn_relu(2 * out_channels, out_channels, 3)
        self.block_size = block_size

    def forward(self, features: Tensor) -> Tensor:
        x = self.before(features)
        (B, C, h, w), (P, Q) = x.shape, self.block_size
        pad_y, pad_x = -h % P, -w % Q
        top, left = pad_y // 2, pad_x // 2
        padded = F.pad(x, (left, pad_x - left, top, pad_y - top))
        down, across = padded.shape[2] // P, padded.shape[3] // Q  # numbers of blocks
        # With the channels last: (B, block row, P, block column, Q, C). A batch of maps for each
        # position in the blocks, and then one for each block.
        grid = padded.permute(0, 2, 3, 1).reshape(B, down, P, across, Q, C)
        far = self._attend(self.far, grid.permute(0, 2, 4, 1, 3, 5))
        near = self._attend(self.near, far.permute(0, 3, 4, 1, 2, 5))
        context = near.permute(0, 1, 3, 2, 4, 5).reshape(B, down * P, across * Q, C)
        context = context[:, top : top + h, left : left + w].permute(0, 3, 1, 2)
        return self.fuse(torch.cat([context, x], dim=1))

    @staticmethod
    def _attend(attention: nn.Module, maps: Tensor) -> Tensor:
        """The attention in maps (B, n, m, h, w, C), each by itself."""
        batch = maps.flatten(0, 2).permute(0, 3, 1, 2)
        return attention(batch).permute(0, 2, 3, 1).reshape(maps.shape)


class PixelAttention(nn.Module):
    """F(softmax(Q K^T / sqrt(T)) V): self-attention with two Conv1x1-BN-ReLU for queries and keys.

    The value is a 1x1 convolution without bias, the output projection F Conv1x1-BN-ReLU.

    Args:
        channels: channels of input, value and result.
        transform_channels: T, channels of queries and keys.

    Shape: (B, channels, h, w) -> the same.
    """

    def __init__(self, channels: int, transform_channels: int) -> None:
        super().__init__()
        self.query, self.key = (
            nn.Sequential(
                conv_bn_relu(channels, transform_channels, 1),
                conv_bn_relu(transform_channels, transform_channels, 1),
            )
            for _ in range(2)
        )
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.output = conv_bn_relu(channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        query, key, value = (
            rows(project(features)) for project in (self.query, self.key, self.value)
        )
        return self.output(to_map(ops.confidence_attention(query, key, value), features))
