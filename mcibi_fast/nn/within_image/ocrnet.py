"""Object-contextual representations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcibi_fast.nn.attention import PositionConfidenceAttention
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.context import resize
from mcibi_fast.nn.rows import rows


class ObjectContext(nn.Module):
    """Object-contextual representations (OCRNet, arXiv 1909.11065).

    Each class's region is the mean of R weighted by softmax over the pixels of its coarse logits;
    an attention gathers from the K regions (query R, T channels); Conv3x3-BN-ReLU fuses the result
    with R. The paper fuses by a 1x1 convolution.

    Args:
        channels: channels of R and of the result.
        transform_channels: T.
        align_corners: whether the resizing of coarse logits of another size aligns corners.

    Shape: R (B, channels, h, w), coarse logits (B, K, h', w') -> (B, channels, h, w).
    """

    def __init__(
        self, channels: int, transform_channels: int = 256, *, align_corners: bool = False
    ) -> None:
        super().__init__()
        self.attention = PositionConfidenceAttention(channels, transform_channels)
        self.fuse = conv_bn_relu(2 * channels, channels, 3)
        self.align_corners = align_corners

    def forward(self, R: Tensor, coarse_logits: Tensor) -> Tensor:
        return self.gather(R, self.regions(R, coarse_logits))

    def regions(self, R: Tensor, coarse_logits: Tensor) -> Tensor:
        """The K regions (B, K, channels)."""
        coarse = resize(coarse_logits, R.shape[2:], self.align_corners)
        return rows(coarse).softmax(dim=1).mT @ rows(R)

    def gather(self, R: Tensor, regions: Tensor) -> Tensor:
        """What each pixel of R gathers from the regions, fused with R: (B, channels, h, w)."""
        context = self.attention(R, regions[:, :, None].permute(0, 3, 1, 2))
        return self.fuse(torch.cat([context, R], dim=1))
