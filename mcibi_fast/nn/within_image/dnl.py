"""Disentangled non-local attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.rows import rows, to_map


class DNL(nn.Module):
    """Disentangled non-local network (arXiv 2006.06668).

    Conv3x3-BN-ReLU, :class:`DisentangledNonLocal`, Conv3x3-BN-ReLU, concatenation with the input,
    Conv3x3-BN-ReLU.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of the block and of the result.
        temperature: temperature t of the pairwise softmax.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, *, temperature: float = 0.05) -> None:
        super().__init__()
        self.before = conv_bn_relu(in_channels, out_channels, 3)
        self.attention = DisentangledNonLocal(out_channels, temperature=temperature)
        self.after = conv_bn_relu(out_channels, out_channels, 3)
        self.fuse = conv_bn_relu(in_channels + out_channels, out_channels, 3)

    def forward(self, features: Tensor) -> Tensor:
        context = self.after(self.attention(self.before(features)))
        return self.fuse(torch.cat([features, context], dim=1))


class DisentangledNonLocal(nn.Module):
    """x + F((softmax_j((q_i - mean q)(k_j - mean k) / (sqrt(T) t)) + softmax_j(m_j)) v_j).

    The first, pairwise term is whitened and measures relations between pixels. The second, unary
    term is the same for all pixels i and measures how salient pixel j is. F is a 1x1 convolution
    with batch norm. The h w x h w scores are not written to memory.

    Args:
        channels: channels of input and result.
        reduction: queries, keys and values have T = ``channels // reduction`` channels.
        temperature: t.

    Shape: (B, channels, h, w) -> the same.
    """

    def __init__(self, channels: int, *, reduction: int = 2, temperature: float = 0.05) -> None:
        super().__init__()
        T = channels // reduction
        self.query = nn.Conv2d(channels, T, 1)
        self.key = nn.Conv2d(channels, T, 1)
        self.value = nn.Conv2d(channels, T, 1)
        self.salience = nn.Conv2d(channels, 1, 1)  # m
        self.output = nn.Sequential(nn.Conv2d(T, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.scale = T**-0.5 / temperature

    def forward(self, features: Tensor) -> Tensor:
        query, key, value = (
            rows(project(features)) for project in (self.query, self.key, self.value)
        )  # (B, N, T)
        # The mean key is not subtracted: it shifts all scores of a query by the same amount, which
        # does not change the softmax.
        query = query - query.mean(dim=1, keepdim=True)
        pairwise = ops.confidence_attention(query, key, value, scale=self.scale)
        unary = rows(self.salience(features)).softmax(dim=1).mT @ value  # (B, 1, T)
        return features + self.output(to_map(pairwise + unary, features))
