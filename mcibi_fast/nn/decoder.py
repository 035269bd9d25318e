"""Classification heads H_pr and H_cls (Eqs. 5 and 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
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
        return self.classify(hidden)

    def classify(self, hidden: Tensor) -> Tensor:
        """The logits of what the first convolution returned."""
        return self.classifier(self.dropout(hidden))

    def prepare(self, fixed: Tensor, *, first: bool = False) -> Tensor:
        """What the input's last (or first) channels contribute, computed once for several calls."""
        return self.conv.prepare(fixed, first=first)


class UpsamplingDecoder(nn.Module):
    """Classifies a map of stride 16: so many times Conv-BN-ReLU and a larger size.

    Channel dropout and a 1x1 convolution to the classes follow. MCIBI's released ViT has three such
    heads as auxiliary ones, and SETR consists of them.

    Args:
        in_channels: channels of the map.
        hidden_channels: channels after each convolution.
        num_classes: K.
        dropout: probability that a channel is dropped while training.
        convs: number of convolutions.
        kernel_size: their kernel size.
        scale: factor of the size after each.
        mode: of the resizing, "nearest" or "bilinear".
        align_corners: whether bilinear resizing aligns corners.

    Shape: (B, in_channels, h, w) -> logits (B, K, scale^convs h, scale^convs w).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_classes: int,
        *,
        dropout: float = 0.1,
        convs: int = 2,
        kernel_size: int = 3,
        scale: int = 4,
        mode: str = "nearest",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            conv_bn_relu(hidden_channels if i else in_channels, hidden_channels, kernel_size)
            for i in range(convs)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(hidden_channels, num_classes, 1)
        self.scale = float(scale)
        self.mode = mode
        self.align_corners = align_corners if mode == "bilinear" else None

    def hidden(self, features: Tensor) -> Tensor:
        """What the last convolution classifies."""
        for block in self.blocks:
            features = F.interpolate(
                block(features),
                scale_factor=self.scale,
                mode=self.mode,
                align_corners=self.align_corners,
            )
        return features

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.hidden(features)))


def auxiliary_decoder(
    in_channels: Sequence[int],
    hidden_channels: int,
    num_classes: int,
    *,
    count: int = 1,
    dropout: float = 0.1,
) -> Decoder | nn.ModuleList:
    """The auxiliary head on the map before the last, or several :class:`UpsamplingDecoder`.

    Args:
        in_channels: channels of all maps, finest first.
        hidden_channels, num_classes, dropout: as for :class:`Decoder`.
        count: number of heads, each on one of as many maps before the last.

    Raises:
        ValueError: there are not so many maps.
    """
    if count == 1:
        return Decoder(
            in_channels[-2], hidden_channels, num_classes, kernel_size=3, dropout=dropout
        )
    if not 1 <= count < len(in_channels):
        raise ValueError(
            f"auxiliary_heads: expected 1 to {len(in_channels) - 1}, the maps before the last, "
            f"got {count}"
        )
    return nn.ModuleList(
        UpsamplingDecoder(channels, hidden_channels, num_classes, dropout=dropout)
        for channels in in_channels[-1 - count : -1]
    )
