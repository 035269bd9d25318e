"""A reduced map with an attention over its pixels, beside the map it was reduced from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcibi_fast.nn.blocks import conv_bn_relu


class AttendedContext(nn.Module):
    """Conv3x3-BN-ReLU, an attention, Conv3x3-BN-ReLU, joined with the input by Conv3x3-BN-ReLU.

    CCNet, DNL, EMANet, GCNet and NonLocal differ only in the attention.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of the attention and of the result.
        attention: a module (B, out_channels, h, w) -> the same.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w). Allocates the concatenation
    (B, in_channels + out_channels, h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, attention: nn.Module) -> None:
        super().__init__()
        self.before = conv_bn_relu(in_channels, out_channels, 3)
        self.attention = attention
        self.after = conv_bn_relu(out_channels, out_channels, 3)
        self.fuse = conv_bn_relu(in_channels + out_channels, out_channels, 3)

    def attend(self, reduced: Tensor) -> Tensor:
        """What the attention makes of the reduced map, of the same shape."""
        return self.attention(reduced)

    def forward(self, features: Tensor) -> Tensor:
        context = self.after(self.attend(self.before(features)))
        return self.fuse(torch.cat([features, context], dim=1))
