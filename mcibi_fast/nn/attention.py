"""Position-confidence attention (Eq. 13)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.nn.blocks import conv_bn_relu

Projections = Literal["paper", "released"]


class PositionConfidenceAttention(nn.Module):
    """C_bi = F_O(softmax(F_R1(R) F_R2(C~)^T / sqrt(T)) F_C(C~)): Eq. 13, one head.

    Args:
        channels: channels of the query and key maps, and of the result.
        transform_channels: T, the width of the attention (C/2 in the paper).
        projections: "paper": each of F_R1, F_R2, F_C, F_O is one 1x1 convolution with bias.
            "released": Conv-BN-ReLU, two of them for the query and the key, one for the value
            and the output.

    Shape: query_features (B, channels, h, w), key_features (B, channels, h', w')
        -> (B, channels, h, w).
    """

    def __init__(
        self, channels: int, transform_channels: int = 256, *, projections: Projections = "released"
    ) -> None:
        super().__init__()
        if projections not in ("paper", "released"):
            raise ValueError(f"projections: expected 'paper' or 'released', got {projections!r}")
        self.scale = transform_channels**-0.5
        if projections == "paper":
            self.query: nn.Module = nn.Conv2d(channels, transform_channels, 1)  # F_R1
            self.key: nn.Module = nn.Conv2d(channels, transform_channels, 1)  # F_R2
            self.value: nn.Module = nn.Conv2d(channels, transform_channels, 1)  # F_C
            self.output: nn.Module = nn.Conv2d(transform_channels, channels, 1)  # F_O
        else:
            self.query = _two_blocks(channels, transform_channels)
            self.key = _two_blocks(channels, transform_channels)
            self.value = conv_bn_relu(channels, transform_channels, 1)
            self.output = conv_bn_relu(transform_channels, channels, 1)

    def forward(self, query_features: Tensor, key_features: Tensor) -> Tensor:
        context = ops.confidence_attention(
            _rows(self.query(query_features)),
            _rows(self.key(key_features)),
            _rows(self.value(key_features)),
            scale=self.scale,
        )
        height, width = query_features.shape[2:]
        return self.output(context.transpose(1, 2).unflatten(2, (height, width)))


def _two_blocks(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        conv_bn_relu(in_channels, out_channels, 1), conv_bn_relu(out_channels, out_channels, 1)
    )


def _rows(features: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h*w, C), a view of contiguous and of channels_last maps alike."""
    return features.flatten(2).transpose(1, 2)
