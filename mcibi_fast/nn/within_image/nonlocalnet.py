"""Non-local attention."""

from __future__ import annotations

from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.nn.rows import rows, to_map
from mcibi_fast.nn.within_image.attended import AttendedContext


class NonLocal(AttendedContext):
    """Non-local network (arXiv 1711.07971): :class:`AttendedContext` with :class:`NonLocalBlock`.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of the block and of the result.
        reduction: see :class:`NonLocalBlock`.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, *, reduction: int = 2) -> None:
        super().__init__(in_channels, out_channels, NonLocalBlock(out_channels, reduction))


class NonLocalBlock(nn.Module):
    """x + F(softmax_j(q_i k_j / sqrt(T)) v_j) over all pixels j (the embedded Gaussian).

    F is a 1x1 convolution with batch norm. The h w x h w scores are not written to memory.

    Args:
        channels: channels of input and result.
        reduction: queries, keys and values have T = ``channels // reduction`` channels, at least 1.

    Shape: (B, channels, h, w) -> the same.
    """

    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__()
        T = max(channels // reduction, 1)
        self.query = nn.Conv2d(channels, T, 1)
        self.key = nn.Conv2d(channels, T, 1)
        self.value = nn.Conv2d(channels, T, 1)
        self.output = nn.Sequential(nn.Conv2d(T, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.scale = T**-0.5

    def forward(self, features: Tensor) -> Tensor:
        return features + self.output(to_map(self.attend(features), features))

    def attend(self, features: Tensor) -> Tensor:
        """The attended values (B, h w, T)."""
        query, key, value = (
            rows(project(features)) for project in (self.query, self.key, self.value)
        )
        return ops.confidence_attention(query, key, value, scale=self.scale)
