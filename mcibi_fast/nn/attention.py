"""Position-confidence attention (Eq. 13)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.rows import rows, standard_rows, to_map
from mcibi_fast.ops.dispatch import explain

Projections = Literal["paper", "released"]


class ClassQuery(NamedTuple):
    """R and C_dl, projected so that attention can run on the class weights W.

    ``scores``: Q F_R2(C_dl)^T (B, K, h, w); ``values``: F_O(F_C(C_dl)) (channels, K, 1, 1).
    """

    scores: Tensor
    values: Tensor


class PositionConfidenceAttention(nn.Module):
    """C_bi = F_O(softmax(F_R1(R) F_R2(C~)^T / sqrt(T)) F_C(C~)): Eq. 13, with one attention head.

    Args:
        channels: channels of the query map and of the result.
        key_channels: channels of the key map, by default the same.
        transform_channels: T, the width of the attention (C/2 in the paper).
        projections: "paper": each of F_R1, F_R2, F_C, F_O is one 1x1 convolution with bias.
            "released": Conv-BN-ReLU, two of them for the query and the key, one for the value
            and the output.

    If the keys are mixtures of K class representations and the projections are linear ("paper"),
    ``attend_classes`` computes the same result directly from the mixing weights.

    Shape: query_features (B, channels, h, w), key_features (B, key_channels, h', w')
        -> (B, channels, h, w).
    """

    def __init__(
        self,
        channels: int,
        transform_channels: int = 256,
        *,
        key_channels: int | None = None,
        projections: Projections = "released",
    ) -> None:
        super().__init__()
        if projections not in ("paper", "released"):
            raise ValueError(f"projections: expected 'paper' or 'released', got {projections!r}")
        key_channels = key_channels or channels
        self.transform_channels = transform_channels
        self.scale = transform_channels**-0.5
        if projections == "paper":
            self.query: nn.Module = nn.Conv2d(channels, transform_channels, 1)  # F_R1
            self.key: nn.Module = nn.Conv2d(key_channels, transform_channels, 1)  # F_R2
            self.value: nn.Module = nn.Conv2d(key_channels, transform_channels, 1)  # F_C
            self.output: nn.Module = nn.Conv2d(transform_channels, channels, 1)  # F_O
        else:
            self.query = _two_blocks(channels, transform_channels)
            self.key = _two_blocks(key_channels, transform_channels)
            self.value = conv_bn_relu(key_channels, transform_channels, 1)
            self.output = conv_bn_relu(transform_channels, channels, 1)

    def forward(self, query_features: Tensor, key_features: Tensor) -> Tensor:
        return self.attend(self.query(query_features), key_features)

    def attend(self, query: Tensor, key_features: Tensor) -> Tensor:
        """``forward`` for a query that is already projected: ``self.query(R)`` (B, T, h, w)."""
        key, value = self.key(key_features), self.value(key_features)
        return self.output(attend_pixels(query, key, value, self.scale))

    @property
    def linear(self) -> bool:
        """Whether ``attend_classes`` may replace ``attend``."""
        return isinstance(self.query, nn.Conv2d)

    def class_tables(self, representations: Tensor) -> tuple[Tensor, Tensor]:
        """The projected C_dl: keys F_R2(C_dl) (K, T), values F_O(F_C(C_dl)) (channels, K, 1, 1).

        Each row of W, and of P W, sums to one, so an affine projection of W C_dl equals W times
        the projection of the K rows of C_dl. Hence the scores are Q (F_R2(C_dl))^T W^T, an
        attention over W itself, and C_bi is (P W) F_O(F_C(C_dl)).

        Args:
            representations: C_dl (K, channels).

        Raises:
            TypeError: the projections are not linear.
        """
        if not self.linear:
            raise TypeError("class_tables: needs linear projections, projections='paper'")
        C_dl = representations.T[None, :, :, None]  # (1, channels, K, 1)
        return self.key(C_dl)[0, :, :, 0].T, self.output(self.value(C_dl))[0, ..., None]

    def project_classes(self, query_features: Tensor, representations: Tensor) -> ClassQuery:
        """The part of ``attend_classes`` that does not depend on W. Linear projections only.

        Args:
            query_features: R (B, channels, h, w).
            representations: C_dl (K, channels), cast to the dtype of R.
        """
        keys, values = self.class_tables(representations.to(query_features.dtype))
        weight, bias = class_query(self, keys)
        return ClassQuery(F.conv2d(query_features, weight, bias), values)

    def attend_classes(
        self, query: ClassQuery, weight_logits: Tensor, *, hard: bool = False
    ) -> Tensor:
        """C_bi for the keys C~ = W C_dl (Eq. 12), which are not formed. Linear projections only.

        Args:
            query: the result of ``project_classes``.
            weight_logits: the logits of W (B, K, h, w).
            hard: W is one-hot at the largest logit (the first on ties) instead of the softmax.

        Returns:
            (B, channels, h, w), equal to ``self(R, C~)`` up to rounding.
        """
        return F.conv2d(mix_classes(query.scores, weight_logits, self.scale, hard), query.values)

    @torch.no_grad()
    def explain(self, query_features: Tensor, key_features: Tensor) -> str:
        """The form of attention that ``forward`` takes, and :func:`mcibi_fast.explain` of its op.

        Inside a :class:`DatasetLevelContext` another form may run; see its ``explain``.
        """
        twin = copy.deepcopy(self).eval()  # a copy: the model's batch statistics stay as they are
        operands = twin.query(query_features), twin.key(key_features), twin.value(key_features)
        return (
            f"{type(self).__name__}: general: the keys are a feature map\n"
            f"{explain_pixels(*operands, self.scale)}"
        )


class SeveralAttentions(nn.Module):
    """n attentions, each over its own key map, joined by Conv1x1-BN-ReLU.

    This is what MCIBI's released code does with n representations per class: the i-th map is
    gathered from the i-th representation of every class. ``explain`` of a context shows the first
    attention.

    Args:
        count: n, the number of attentions.
        channels: channels of the query map, of each key map and of the result.
        transform_channels: T, the width of each attention.
        projections: see :class:`PositionConfidenceAttention`.

    Shape: query_features (B, channels, h, w), key_features (B, n channels, h', w')
        -> (B, channels, h, w).
    """

    linear = False

    def __init__(
        self,
        count: int,
        channels: int,
        transform_channels: int = 256,
        *,
        projections: Projections = "released",
    ) -> None:
        super().__init__()
        self.transform_channels = transform_channels
        self.parts = nn.ModuleList(
            PositionConfidenceAttention(channels, transform_channels, projections=projections)
            for _ in range(count)
        )
        self.join = conv_bn_relu(count * channels, channels, 1)

    def query(self, query_features: Tensor) -> Tensor:
        """The n projected queries (B, n T, h, w)."""
        return torch.cat([part.query(query_features) for part in self._attentions()], dim=1)

    def attend(self, query: Tensor, key_features: Tensor) -> Tensor:
        """The joined results of the n attentions (B, channels, h, w)."""
        count = len(self.parts)
        pairs = zip(query.chunk(count, dim=1), key_features.chunk(count, dim=1), strict=True)
        maps = [part.attend(*pair) for part, pair in zip(self._attentions(), pairs, strict=True)]
        return self.join(torch.cat(maps, dim=1))

    def _attentions(self) -> Iterable[PositionConfidenceAttention]:
        return cast(Iterable[PositionConfidenceAttention], self.parts)


def class_query(attention: PositionConfidenceAttention, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the 1x1 convolution that computes Q keys^T from R, with K channels.

    Args:
        attention: an attention with linear projections.
        keys: F_R2(C_dl) (K, T).
    """
    query: Any = attention.query
    return (keys @ query.weight.flatten(1))[..., None, None], keys @ query.bias


def attend_pixels(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K^T) V over the pixels of projected maps; each is (B, T, h, w)."""
    return to_map(ops.confidence_attention(*map(rows, (query, key, value)), scale=scale), query)


def explain_pixels(query: Tensor, key: Tensor, value: Tensor, scale: float) -> str:
    """Which backend ``attend_pixels`` takes, and why not the others."""
    return explain(ops.confidence_attention, *map(rows, (query, key, value)), scale=scale)


def mix_classes(scores: Tensor, weight_logits: Tensor, scale: float, hard: bool) -> Tensor:
    """P W (B, K, h, w): the weights of the K classes at each pixel after the attention (Eq. 13).

    Args:
        scores: Q F_R2(C_dl)^T (B, K, h, w).
        weight_logits: the logits of W (B, K, h, w).
        scale: factor of the attention's scores.
        hard: see :meth:`PositionConfidenceAttention.attend_classes`.
    """
    out = ops.class_rank_attention(
        *_class_rows(scores, weight_logits, hard), scale=scale, hard=hard
    )
    return to_map(out, scores)


def mix_rows(weight_logits: Tensor, table: Tensor, *, hard: bool) -> Tensor:
    """The rows of a table (K, Z), mixed by the logits of W: (B, K, h, w) -> (B, Z, h, w).

    On the CPU this takes half the time of a softmax and a matrix product.
    """
    return ops.gaussian_aggregate(
        weight_logits, standard_rows(table), table.shape[1], noise=table, hard=hard
    )


def explain_classes(scores: Tensor, weight_logits: Tensor, scale: float, hard: bool) -> str:
    """Which backend ``mix_classes`` takes, and why not the others."""
    operands = _class_rows(scores, weight_logits, hard)
    return explain(ops.class_rank_attention, *operands, scale=scale, hard=hard)


def _class_rows(scores: Tensor, weight_logits: Tensor, hard: bool) -> tuple[Tensor, Tensor]:
    weights = weight_logits if hard else weight_logits.softmax(dim=1)
    return rows(scores), rows(weights).to(scores.dtype)


def _two_blocks(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        conv_bn_relu(in_channels, out_channels, 1), conv_bn_relu(out_channels, out_channels, 1)
    )
