"""Position-confidence attention (Eq. 13)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.nn.blocks import conv_bn_relu

Projections = Literal["paper", "released"]


class PositionConfidenceAttention(nn.Module):
    """C_bi = F_O(softmax(F_R1(R) F_R2(C~)^T / sqrt(T)) F_C(C~)): Eq. 13, one head.

    Args:
        channels: channels of the query and key maps, and of the result.
        transform_channels: T, the width of the attention (C/2 in the paper).
        projections: "paper": each of F_R1, F_R2, F_C, F_O is one 1x1 convolution with bias.
            "released": Conv-BN-ReLU, two of them for the query and the key, one for the value
            and the output.

    Over keys that are mixtures of K class representations, ``attend_classes`` computes the same
    from the mixing weights, where the projections are linear ("paper").

    Shape: query_features (B, channels, h, w), key_features (B, channels, h', w')
        -> (B, channels, h, w).
    """

    def __init__(
        self, channels: int, transform_channels: int = 256, *, projections: Projections = "released"
    ) -> None:
        super().__init__()
        if projections not in ("paper", "released"):
            raise ValueError(f"projections: expected 'paper' or 'released', got {projections!r}")
        self.scale = transform_channels**-0.5
        if projections == "paper":
            self.query: nn.Module = nn.Conv2d(channels, transform_channels, 1)  # F_R1
            self.key: nn.Module = nn.Conv2d(channels, transform_channels, 1)  # F_R2
            self.value: nn.Module = nn.Conv2d(channels, transform_channels, 1)  # F_C
            self.output: nn.Module = nn.Conv2d(transform_channels, channels, 1)  # F_O
        else:
            self.query = _two_blocks(channels, transform_channels)
            self.key = _two_blocks(channels, transform_channels)
            self.value = conv_bn_relu(channels, transform_channels, 1)
            self.output = conv_bn_relu(transform_channels, channels, 1)

    def forward(self, query_features: Tensor, key_features: Tensor) -> Tensor:
        context = ops.confidence_attention(
            _rows(self.query(query_features)),
            _rows(self.key(key_features)),
            _rows(self.value(key_features)),
            scale=self.scale,
        )
        return self.output(_map(context, query_features))

    @property
    def linear(self) -> bool:
        """Whether ``attend_classes`` may replace ``forward``."""
        return isinstance(self.query, nn.Conv2d)

    def attend_classes(
        self,
        query_features: Tensor,
        weight_logits: Tensor,
        representations: Tensor,
        *,
        hard: bool = False,
    ) -> Tensor:
        """C_bi of keys C~ = W C_dl (Eq. 12), without forming them. Linear projections only.

        The rows of W sum to one, and so do those of P W: an affine projection of the K rows of C_dl
        is that of every pixel. So the scores are Q (F_R2(C_dl))^T W^T, an attention over W itself,
        and C_bi is (P W) F_O(F_C(C_dl)).

        Args:
            query_features: R (B, channels, h, w).
            weight_logits: the logits of W (B, K, h, w).
            representations: C_dl (K, channels), cast to the dtype of R.
            hard: W is the one-hot of the largest logit (the first on ties) instead of the softmax.

        Returns:
            (B, channels, h, w), equal to ``self(R, C~)`` up to rounding.
        """
        if not isinstance(self.query, nn.Conv2d):
            raise TypeError("attend_classes: needs linear projections, projections='paper'")
        C_dl = representations.to(query_features.dtype).T[None, :, :, None]  # (1, channels, K, 1)
        keys = self.key(C_dl)[0, :, :, 0].T  # (K, T)
        values = self.output(self.value(C_dl))[0]  # (channels, K, 1)
        # Q keys^T is one convolution of R onto K channels.
        folded = (keys @ self.query.weight.flatten(1))[..., None, None]
        bias = None if self.query.bias is None else keys @ self.query.bias
        query = F.conv2d(query_features, folded, bias)
        weights = weight_logits if hard else weight_logits.softmax(dim=1)
        mixed = ops.class_rank_attention(
            _rows(query), _rows(weights).to(query.dtype), scale=self.scale, hard=hard
        )  # P W (B, N, K)
        return F.conv2d(_map(mixed, query_features), values[..., None])


def _two_blocks(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        conv_bn_relu(in_channels, out_channels, 1), conv_bn_relu(out_channels, out_channels, 1)
    )


def _rows(features: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h*w, C), a view of contiguous and of channels_last maps alike."""
    return features.flatten(2).transpose(1, 2)


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """(B, h*w, C) -> (B, C, h, w) of the height and width of ``like``."""
    return rows.transpose(1, 2).unflatten(2, like.shape[2:])
