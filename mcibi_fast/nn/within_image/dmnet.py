"""Dynamic multi-scale filters."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.nn.blocks import conv_bn_relu


class DMNet(nn.Module):
    """Dynamic multi-scale filters network (ICCV 2019).

    Conv3x3-BN-ReLU on the concatenation of the input and one :class:`DynamicContext` per size. As
    in the released code, no 1x1 convolution follows the dynamic ones.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of each context and of the result.
        filter_sizes: sizes of the predicted kernels; one context for each.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w). Allocates the concatenation
    (B, in_channels + len(filter_sizes) * out_channels, h, w).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, filter_sizes: Sequence[int] = (1, 3, 5, 7)
    ) -> None:
        super().__init__()
        self.contexts = nn.ModuleList(
            DynamicContext(in_channels, out_channels, size) for size in filter_sizes
        )
        self.fuse = conv_bn_relu(in_channels + len(filter_sizes) * out_channels, out_channels, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.fuse(torch.cat([features, *(c(features) for c in self.contexts)], dim=1))


class DynamicContext(nn.Module):
    """ReLU(BN(x * k)), where the image itself predicts the depthwise kernel k.

    x is the reduced map and k, with one k x k kernel per image and channel, a 1x1 convolution of
    the means over k x k regions of the input. The map is padded with zeros.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        filter_size: side of the kernels.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, filter_size: int) -> None:
        super().__init__()
        self.kernels = nn.Conv2d(in_channels, out_channels, 1)
        self.reduce = conv_bn_relu(in_channels, out_channels, 1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU(inplace=True)
        self.filter_size = filter_size

    def forward(self, features: Tensor) -> Tensor:
        kernels = self.kernels(F.adaptive_avg_pool2d(features, self.filter_size))
        before, after = self.filter_size // 2, (self.filter_size - 1) // 2
        x = F.pad(self.reduce(features), (before, after, before, after))
        filter_each = _by_offsets if torch.compiler.is_exporting() else _in_groups
        return self.activation(self.norm(filter_each(x, kernels)))


def _in_groups(x: Tensor, kernels: Tensor) -> Tensor:
    """Each image and channel (B, C, H, W) with its own kernel (B, C, k, k): one group for each."""
    B, C = x.shape[:2]
    maps, weight = x.reshape(1, B * C, *x.shape[2:]), kernels.flatten(0, 1)[:, None]
    return F.conv2d(maps, weight, groups=B * C).unflatten(1, (B, C))[0]


def _by_offsets(x: Tensor, kernels: Tensor) -> Tensor:
    """The same for a batch of any size in an exported program, whose groups are fixed in ONNX."""
    k = kernels.shape[2]
    h, w = x.shape[2] - k + 1, x.shape[3] - k + 1
    products = (
        kernels[:, :, i : i + 1, j : j + 1] * x[:, :, i : i + h, j : j + w]
        for i in range(k)
        for j in range(k)
    )
    return functools.reduce(torch.add, products)
