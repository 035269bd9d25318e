"""Classification heads H_pr and H_cls (Eqs. 5 and 10)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mcibi_fast.nn.blocks import conv_bn_relu


class Decoder(nn.Module):
    """Conv-BN-ReLU, channel dropout, and a 1x1 convolution to the classes.

    Args:
        in_channels: channels of the features.
        hidden_channels: channels between the two convolutions.
        num_classes: K.
        kernel_size: kernel size of the first convolution.
        dropout: probability that a channel is dropped while training.
        conv: a module from ``in_channels`` to ``hidden_channels`` that is used instead of
            Conv-BN-ReLU, for example a context within the image; ``prepare`` is then not available.

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
        conv: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv: Any = conv
        if conv is None:
            self.conv = conv_bn_relu(in_channels, hidden_channels, kernel_size)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(hidden_channels, num_classes, 1)

    def forward(
        self, features: Tensor, prepared: Tensor | None = None, *, first: bool = False
    ) -> Tensor:
        """The logits; some of the input's channels may have been prepared before.

        Args:
            features: the input, or, with ``prepared``, its channels that were not prepared.
            prepared: the result of ``prepare`` for the input's last (or first) channels.
            first: whether the prepared channels come first.
        """
        if prepared is None:
            hidden = self.conv(features)
        else:
            hidden = self.conv.join(prepared, features, first=first)
        return self.classifier(self.dropout(hidden))

    def prepare(self, fixed: Tensor, *, first: bool = False) -> Tensor:
        """What the input's last (or first) channels contribute, computed once for several calls."""
        return self.conv.prepare(fixed, first=first)
