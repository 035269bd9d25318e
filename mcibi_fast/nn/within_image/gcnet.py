"""Global context: one vector for the whole image."""

from __future__ import annotations

from torch import Tensor, nn

from mcibi_fast.nn.rows import rows
from mcibi_fast.nn.within_image.attended import AttendedContext


class GCNet(AttendedContext):
    """Global context network (arXiv 1904.11492): :class:`AttendedContext` with
    :class:`GlobalContext`.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of the block and of the result.
        reduction: see :class:`GlobalContext`.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, *, reduction: int = 4) -> None:
        super().__init__(in_channels, out_channels, GlobalContext(out_channels, reduction))


class GlobalContext(nn.Module):
    """x_i + F(sum_j softmax_j(m_j) x_j): the same vector is added to every pixel i.

    m is a 1x1 convolution to one channel. F is two 1x1 convolutions, with layer norm and ReLU in
    between.

    Args:
        channels: channels of input and result.
        reduction: F has ``channels // reduction`` channels in between, at least 1.

    Shape: (B, channels, h, w) -> the same.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.salience = nn.Conv2d(channels, 1, 1)  # m
        self.transform = nn.Sequential(  # F
            nn.Conv2d(channels, hidden, 1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        weights = rows(self.salience(features)).softmax(dim=1)  # (B, N, 1)
        context = weights.mT @ rows(features).to(weights.dtype)  # (B, 1, C)
        return features + self.transform(context.mT[..., None])
