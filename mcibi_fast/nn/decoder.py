"""Classification heads H_pr and H_cls (Eqs. 5 and 10)."""

from __future__ import annotations

from torch import Tensor, nn

from mcibi_fast.nn.blocks import conv_bn_relu


class Decoder(nn.Module):
    """Conv-BN-ReLU, channel dropout, and a 1x1 convolution to the classes.

    Args:
        in_channels: channels of the features.
        hidden_channels: channels between the two convolutions.
        num_classes: K.
        kernel_size: of the first convolution.
        dropout: probability that a channel is dropped while training.

    Shape: (B, in_channels, h, w) -> logits (B, K, h, w).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_classes: int,
        *,
        kernel_size: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.conv = conv_bn_relu(in_channels, hidden_channels, kernel_size)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(hidden_channels, num_classes, 1)

    def forward(self, features: Tensor, prepared: Tensor | None = None) -> Tensor:
        """``prepared`` stands for the input's last channels, if ``features`` lacks them."""
        if prepared is None:
            hidden = self.conv(features)
        else:
            hidden = self.conv.join(prepared, features, first=False)
        return self.classifier(self.dropout(hidden))

    def prepare(self, within: Tensor) -> Tensor:
        """What the input's last channels contribute; to be computed once for several calls."""
        return self.conv.prepare(within, first=False)
