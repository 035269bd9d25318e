"""Disentangled non-local attention."""

from __future__ import annotations

from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.nn.rows import rows
from mcibi_fast.nn.within_image.attended import AttendedContext
from mcibi_fast.nn.within_image.nonlocalnet import NonLocalBlock


class DNL(AttendedContext):
    """Disentangled non-local network (arXiv 2006.06668): :class:`AttendedContext` with
    :class:`DisentangledNonLocal`.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of the block and of the result.
        temperature: temperature t of the pairwise softmax.
        reduction: see :class:`DisentangledNonLocal`.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temperature: float = 0.05,
        reduction: int = 2,
    ) -> None:
        block = DisentangledNonLocal(out_channels, reduction=reduction, temperature=temperature)
        super().__init__(in_channels, out_channels, block)


class DisentangledNonLocal(NonLocalBlock):
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
        super().__init__(channels, reduction)
        self.salience = nn.Conv2d(channels, 1, 1)  # m
        self.scale /= temperature

    def attend(self, features: Tensor) -> Tensor:
        query, key, value = (
            rows(project(features)) for project in (self.query, self.key, self.value)
        )  # (B, N, T)
        # The mean key is not subtracted: it shifts all scores of a query by the same amount, which
        # does not change the softmax.
        query = query - query.mean(dim=1, keepdim=True)
        pairwise = ops.confidence_attention(query, key, value, scale=self.scale)
        return pairwise + rows(self.salience(features)).softmax(dim=1).mT @ value  # + (B, 1, T)
