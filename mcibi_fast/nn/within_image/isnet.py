"""ISNet: context from the whole image, and from the regions where each class is predicted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcibi_fast.nn.attention import PositionConfidenceAttention
from mcibi_fast.nn.blocks import conv_bn_relu


class ISNetContext(nn.Module):
    """Image-level, then semantic-level context (ISNet, arXiv 2108.12382).

    Args:
        channels: C, the channels of the features and of the result.
        transform_channels: width of both attentions.

    Shape: features (B, C, h, w), logits of a first prediction on them (B, K, h, w)
        -> (B, C, h, w).
    """

    def __init__(self, channels: int, transform_channels: int = 256) -> None:
        super().__init__()
        self.image_level = ImageLevelContext(channels, transform_channels)
        self.semantic_level = SemanticLevelContext(channels, transform_channels)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        return self.semantic_level(features, logits, self.image_level(features))


class ImageLevelContext(nn.Module):
    """Attention over pixels whose keys are [mean over the image, pixel], fused with the input.

    Args:
        channels: C, the channels of the features and of the result.
        transform_channels: width of the attention.

    Shape: (B, C, h, w) -> (B, C, h, w).
    """

    def __init__(self, channels: int, transform_channels: int = 256) -> None:
        super().__init__()
        self.attention = PositionConfidenceAttention(
            channels, transform_channels, key_channels=2 * channels
        )
        self.fuse = conv_bn_relu(2 * channels, channels, 3)

    def forward(self, features: Tensor) -> Tensor:
        mean = features.mean(dim=(2, 3), keepdim=True).expand_as(features)
        context = self.attention(features, torch.cat([mean, features], dim=1))
        return self.fuse(torch.cat([features, context], dim=1))


class SemanticLevelContext(nn.Module):
    """Attention of each pixel to the representations of the regions of the predicted classes.

    The result is fused with the image-level context. :func:`class_regions` computes the
    representations.

    Args:
        channels: C, the channels of the features and of the result.
        transform_channels: width of the attention.

    Shape: features (B, C, h, w), logits (B, K, h, w), image-level context (B, C, h, w)
        -> (B, C, h, w).
    """

    def __init__(self, channels: int, transform_channels: int = 256) -> None:
        super().__init__()
        self.attention = PositionConfidenceAttention(channels, transform_channels)
        self.fuse = conv_bn_relu(2 * channels, channels, 3)

    def forward(self, features: Tensor, logits: Tensor, image_level: Tensor) -> Tensor:
        context = self.attention(features, class_regions(features, logits))
        return self.fuse(torch.cat([image_level, context], dim=1))


def class_regions(features: Tensor, logits: Tensor) -> Tensor:
    """For each pixel, the representation of its class in its image.

    A pixel belongs to the class of its largest logit. In each image a class is represented by the
    weighted sum of its pixels' features; the weights are the softmax, over these pixels, of their
    logits for that class.

    Args:
        features: (B, C, h, w).
        logits: (B, K, h, w).

    Returns:
        (B, C, h, w). The function allocates three maps of the logits' size.
    """
    scores = logits.flatten(2)  # (B, K, N)
    classes = torch.arange(scores.shape[1], device=scores.device)[:, None]
    member = scores.argmax(dim=1, keepdim=True) == classes  # (B, K, N)
    # A class without pixels gets equal, finite weights; no pixel reads it.
    lowest = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~member, lowest).softmax(dim=2)
    pixels = features.flatten(2)  # (B, C, N)
    regions = pixels @ weights.to(pixels.dtype).mT  # (B, C, K)
    return (regions @ member.to(pixels.dtype)).unflatten(2, features.shape[2:])
