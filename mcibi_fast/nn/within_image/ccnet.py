"""Criss-cross attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcibi_fast.nn.within_image.attended import AttendedContext


class CCNet(AttendedContext):
    """Recurrent criss-cross attention (CCNet, arXiv 1811.11721).

    :class:`AttendedContext` with ``recurrence`` passes of one :class:`CrissCrossAttention`. After
    two passes every pixel has received something from every other pixel.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of the attention and of the result.
        recurrence: number of passes.
        reduction: see :class:`CrissCrossAttention`.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, recurrence: int = 2, reduction: int = 8
    ) -> None:
        attention = CrissCrossAttention(out_channels, reduction=reduction)
        super().__init__(in_channels, out_channels, attention)
        self.recurrence = recurrence

    def attend(self, reduced: Tensor) -> Tensor:
        for _ in range(self.recurrence):
            reduced = self.attention(reduced)
        return reduced


class CrissCrossAttention(nn.Module):
    """x + gamma * sum_j softmax_j(q_i k_j) v_j over the pixels j in the row and column of i.

    A pixel counts itself once, so there are h + w - 1 keys; the scores are not scaled. Allocates
    the scores, B h w (h + w) numbers, and never an h w x h w matrix.

    Args:
        channels: channels of input, value and result.
        reduction: queries and keys have ``channels // reduction`` channels.

    Shape: (B, channels, h, w) -> the same.
    """

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // reduction, 1)
        self.key = nn.Conv2d(channels, channels // reduction, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def reset_parameters(self) -> None:
        """Sets what is not in a submodule as after ``__init__``."""
        nn.init.zeros_(self.gamma)

    def forward(self, features: Tensor) -> Tensor:
        h, w = features.shape[2:]
        # (B, h, w, C): one batched product for all columns, and one for all rows.
        query, key, value = (
            project(features).permute(0, 2, 3, 1) for project in (self.query, self.key, self.value)
        )
        column = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)  # (B, w, h, h)
        itself = torch.eye(h, dtype=torch.bool, device=features.device)
        column = column.masked_fill(itself, -torch.inf)  # the pixel is among its row's keys
        row = query @ key.transpose(2, 3)  # (B, h, w, w)
        weights = torch.cat([column.transpose(1, 2), row], dim=3).softmax(dim=3)
        column, row = weights.split([h, w], dim=3)
        context = (column.transpose(1, 2) @ value.transpose(1, 2)).transpose(1, 2) + row @ value
        return features + self.gamma * context.permute(0, 3, 1, 2)
