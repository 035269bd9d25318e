"""Dataset-level context aggregation A_bi and the transform F_T (section 3.3, Eq. 4, Table 2)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.nn.attention import PositionConfidenceAttention, Projections
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.decoder import Decoder
from mcibi_fast.nn.memory import GaussianMemory

Fusion = Literal["add", "weighted_add", "concatenation"]


class DatasetLevelOutput(NamedTuple):
    """``features``: R_aug (B, out_channels, h, w); ``weight_logits``: H_pr's (B, K, h, w)."""

    features: Tensor
    weight_logits: Tensor


class DatasetLevelContext(nn.Module):
    """Pixel representations augmented with the dataset-level context (Eqs. 10-13 and 4).

    W = H_pr(R); C~_bi = softmax(W) C_dl; C_bi = attention(R, C~_bi); R_aug = F_T(R, C_bi).

    With linear projections ("paper") and without ``downsample``, C~_bi is not formed: the attention
    runs on W itself (:meth:`PositionConfidenceAttention.attend_classes`), equal up to rounding.

    Args:
        memory: holds the distributions that C_dl is drawn from. Call its ``update`` once per
            training step.
        out_channels: channels of R_aug, default those of R; only "concatenation" can change them.
        transform_channels: width of the attention.
        projections: of the attention, see :class:`PositionConfidenceAttention`.
        fusion: F_T. "add": R + C_bi. "weighted_add": the two summed with weights that a 1x1
            convolution predicts per pixel (softmax over the two). "concatenation": Conv3x3-BN-ReLU
            on both.
        hard: gather with the one-hot of the largest weight instead of the softmax.
        downsample: halve R and C~_bi by a shared Conv3x3-BN-ReLU of stride 2 before the attention;
            C_bi is resized back.
        dropout: of H_pr.
        align_corners: of that resizing.

    Shape: (B, Z, h, w) -> R_aug (B, out_channels, h, w) and the logits of W (B, K, h, w).
    """

    def __init__(
        self,
        memory: GaussianMemory,
        *,
        out_channels: int | None = None,
        transform_channels: int = 256,
        projections: Projections = "released",
        fusion: Fusion = "concatenation",
        hard: bool = False,
        downsample: bool = False,
        dropout: float = 0.1,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        channels = memory.channels
        self.memory = memory
        self.weight_head = Decoder(channels, channels, memory.num_classes, dropout=dropout)  # H_pr
        self.attention = PositionConfidenceAttention(
            channels, transform_channels, projections=projections
        )
        self.downsample = conv_bn_relu(channels, channels, 3, stride=2) if downsample else None
        self.fuse = _fusion(fusion, channels, out_channels or channels)
        self.hard = hard
        self.align_corners = align_corners

    def forward(self, features: Tensor, weight_logits: Tensor | None = None) -> DatasetLevelOutput:
        """``weight_logits`` replaces H_pr's as the weights that gather (iterative inference)."""
        predicted = self.weight_head(features)
        context = self.aggregate(features, predicted if weight_logits is None else weight_logits)
        return DatasetLevelOutput(self.fuse(features, context), predicted)

    def augment(self, features: Tensor, weight_logits: Tensor) -> Tensor:
        """R_aug for given logits of W."""
        return self.fuse(features, self.aggregate(features, weight_logits))

    def aggregate(self, features: Tensor, weight_logits: Tensor) -> Tensor:
        """C_bi (B, Z, h, w), Eqs. 11-13, for given logits of W."""
        if weight_logits.shape[2:] != features.shape[2:]:
            raise ValueError(
                f"weight_logits: expected the features' size {tuple(features.shape[2:])}, "
                f"got {tuple(weight_logits.shape[2:])}"
            )
        if self.attention.linear and self.downsample is None:
            C_dl = self.memory.representations()
            return self.attention.attend_classes(features, weight_logits, C_dl, hard=self.hard)
        coarse = self.memory.aggregate(weight_logits, hard=self.hard)
        if self.downsample is None:
            return self.attention(features, coarse)
        context = self.attention(self.downsample(features), self.downsample(coarse))
        return F.interpolate(
            context, features.shape[2:], mode="bilinear", align_corners=self.align_corners
        )


class Add(nn.Module):
    """R + C_bi."""

    def forward(self, features: Tensor, context: Tensor) -> Tensor:
        return features + context


class WeightedAdd(nn.Module):
    """w_0 R + w_1 C_bi, (w_0, w_1) = softmax of a 1x1 convolution on both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weights = nn.Conv2d(2 * channels, 2, 1)

    def forward(self, features: Tensor, context: Tensor) -> Tensor:
        weights = self.weights(torch.cat([features, context], dim=1)).softmax(dim=1)
        return weights[:, :1] * features + weights[:, 1:] * context


class Concatenation(nn.Module):
    """Conv3x3-BN-ReLU on [R, C_bi]."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = conv_bn_relu(2 * channels, out_channels, 3)

    def forward(self, features: Tensor, context: Tensor) -> Tensor:
        return self.conv(torch.cat([features, context], dim=1))


def _fusion(fusion: Fusion, channels: int, out_channels: int) -> nn.Module:
    if fusion == "concatenation":
        return Concatenation(channels, out_channels)
    if out_channels != channels:
        raise ValueError(f"out_channels: fusion={fusion!r} keeps the {channels} channels of R")
    if fusion == "add":
        return Add()
    if fusion == "weighted_add":
        return WeightedAdd(channels)
    raise ValueError(f"fusion: expected 'add', 'weighted_add' or 'concatenation', got {fusion!r}")
