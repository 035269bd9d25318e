"""Asymmetric non-local attention: keys and values are pooled over a pyramid of regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.rows import rows, to_map

_SCALES = (1, 3, 6, 8)


class ANN(nn.Module):
    """Asymmetric non-local network (arXiv 1908.07678).

    :class:`AFNB` fuses the last map with the one before it, Conv3x3-BN-ReLU reduces the channels,
    and :class:`APNB` adds attention over the reduced map.

    Args:
        low_channels: channels of the map before the last.
        in_channels: channels of the last map.
        out_channels: channels of the reduced map and of the result.
        transform_channels: channels of queries, keys and values.
        pool_scales: regions per side at each level of the pyramid. The number of keys is the sum of
            their squares, by default 110.
        dropout: probability that a channel is dropped after the fusion, in training.

    Shape: last map (B, in_channels, h, w), the one before (B, low_channels, h', w')
        -> (B, out_channels, h, w).
    """

    def __init__(
        self,
        low_channels: int,
        in_channels: int,
        out_channels: int,
        *,
        transform_channels: int = 256,
        pool_scales: Sequence[int] = _SCALES,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.fusion = AFNB(
            low_channels,
            in_channels,
            transform_channels=transform_channels,
            pool_scales=pool_scales,
        )
        self.dropout = nn.Dropout2d(dropout)
        self.reduce = conv_bn_relu(in_channels, out_channels, 3)
        self.context = APNB(
            out_channels, transform_channels=transform_channels, pool_scales=pool_scales
        )

    def forward(self, features: Tensor, low_features: Tensor) -> Tensor:
        fused = self.dropout(self.fusion(features, low_features))
        return self.context(self.reduce(fused))


class AFNB(nn.Module):
    """Asymmetric fusion: the last map attends to the map before it, pooled.

    Args:
        low_channels: channels of the map that gives keys and values.
        channels: channels of the map that gives the queries, and of the result.
        transform_channels, pool_scales: see :class:`ANN`.

    Shape: (B, channels, h, w), (B, low_channels, h', w') -> (B, channels, h, w).
    """

    def __init__(
        self,
        low_channels: int,
        channels: int,
        *,
        transform_channels: int = 256,
        pool_scales: Sequence[int] = _SCALES,
    ) -> None:
        super().__init__()
        self.query = conv_bn_relu(channels, transform_channels, 1)
        self.key = conv_bn_relu(low_channels, transform_channels, 1)
        self.value = nn.Conv2d(low_channels, transform_channels, 1, bias=False)
        self.output = nn.Conv2d(transform_channels, channels, 1, bias=False)
        self.pool = PooledPyramid(pool_scales)
        self.fuse = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, features: Tensor, low_features: Tensor) -> Tensor:
        context = self.output(
            asymmetric_attention(
                self.query(features),
                self.pool(self.key(low_features)),
                self.pool(self.value(low_features)),
            )
        )
        return self.fuse(torch.cat([context, features], dim=1))


class APNB(nn.Module):
    """Asymmetric pyramid attention: a map attends to itself, pooled.

    Queries and keys share one projection.

    Args:
        channels: channels of the map and of the result.
        transform_channels, pool_scales: see :class:`ANN`.

    Shape: (B, channels, h, w) -> the same.
    """

    def __init__(
        self,
        channels: int,
        *,
        transform_channels: int = 256,
        pool_scales: Sequence[int] = _SCALES,
    ) -> None:
        super().__init__()
        self.query = conv_bn_relu(channels, transform_channels, 1)  # and the key, before pooling
        # The published code runs it twice on the same map, once for the query and once for the key,
        # and so updates its batch statistics twice in every step.
        norm: Any = self.query[1]
        norm.momentum = 1 - (1 - norm.momentum) ** 2
        self.value = nn.Conv2d(channels, transform_channels, 1, bias=False)
        self.output = nn.Conv2d(transform_channels, channels, 1, bias=False)
        self.pool = PooledPyramid(pool_scales)
        self.fuse = conv_bn_relu(2 * channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        query = self.query(features)
        context = self.output(
            asymmetric_attention(query, self.pool(query), self.pool(self.value(features)))
        )
        return self.fuse(torch.cat([context, features], dim=1))


class PooledPyramid(nn.Module):
    """Means over s x s regions for every scale s: (B, C, h, w) -> (B, sum of s^2, C)."""

    def __init__(self, scales: Sequence[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(nn.AdaptiveAvgPool2d(s) for s in scales)

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([rows(pool(features)) for pool in self.scales], dim=1)


def asymmetric_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q k / sqrt(T)) v: queries (B, T, h, w), keys and values (B, S, T) -> (B, T, h, w).

    S (110 by default) does not depend on the map's size; the h w x S scores are not written to
    memory.
    """
    return to_map(ops.confidence_attention(rows(query), keys, values), query)
