"""Context encoding."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.rows import rows


class EncNet(nn.Module):
    """Context encoding (EncNet, arXiv 1803.08904).

    Conv3x3-BN-ReLU to x; an encoding e of the whole image, which is the mean over the codewords of
    their residuals after batch norm and ReLU; x + x * sigmoid(F(e)).

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of x, of the encoding and of the result.
        num_codes: number of codewords.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w). :meth:`encode` also returns the
    encoding e (B, out_channels), from which the classes that are present can be predicted.
    """

    def __init__(self, in_channels: int, out_channels: int, *, num_codes: int = 32) -> None:
        super().__init__()
        self.before = conv_bn_relu(in_channels, out_channels, 3)
        self.project = conv_bn_relu(out_channels, out_channels, 1)
        self.encoding = Encoding(out_channels, num_codes)
        self.norm = nn.BatchNorm1d(num_codes)
        self.activation = nn.ReLU(inplace=True)
        self.gate = nn.Linear(out_channels, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        return self.encode(features)[0]

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The result and the encoding e."""
        x = self.before(features)
        residuals = self.encoding(self.project(x))
        encoding = self.activation(self.norm(residuals)).mean(dim=1)
        # The ReLU that follows in the paper changes nothing: x is not negative.
        return x * (1 + self.gate(encoding).sigmoid()[:, :, None, None]), encoding


class Encoding(nn.Module):
    """Sums over the pixels of a_ik (x_i - c_k), with a_i = softmax_k(s_k |x_i - c_k|^2).

    Nothing of size pixels x codewords x channels is formed.

    Args:
        channels: channels of the pixels and of the codewords.
        num_codes: number of codewords c_k, each with a smoothing factor s_k.

    Shape: (B, channels, h, w) -> (B, num_codes, channels).
    """

    def __init__(self, channels: int, num_codes: int) -> None:
        super().__init__()
        self.codewords = nn.Parameter(torch.empty(num_codes, channels))
        self.scale = nn.Parameter(torch.empty(num_codes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random codewords near 0, and smoothing factors between -1 and 0."""
        reach = self.codewords.numel() ** -0.5
        nn.init.uniform_(self.codewords, -reach, reach)
        nn.init.uniform_(self.scale, -1, 0)

    def forward(self, features: Tensor) -> Tensor:
        # 16 bits would round the squares by more than codewords differ. (Autocast knows no "meta".)
        device = features.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            wide = torch.promote_types(features.dtype, torch.float32)
            x, c = rows(features).to(wide), self.codewords.to(wide)
            squares = (x * x).sum(dim=2, keepdim=True) - 2 * x @ c.T + (c * c).sum(dim=1)
            weights = (self.scale * squares).softmax(dim=2)  # (B, N, num_codes)
            sums = weights.mT @ x - weights.sum(dim=1)[:, :, None] * c
        return sums.to(self.codewords.dtype)
