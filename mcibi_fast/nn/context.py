"""The context that pixels gather from the dataset (section 3.3), and its fusion with R.

The paper calls the gathering A_bi (Eqs. 10-13) and the fusion F_T (Eq. 4, Table 2).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.nn.attention import (
    ClassQuery,
    PositionConfidenceAttention,
    Projections,
    SeveralAttentions,
    explain_classes,
    explain_pixels,
)
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.class_memory import ClassMemory
from mcibi_fast.nn.decoder import Decoder
from mcibi_fast.nn.observing import follow_optimizers

Fusion = Literal["add", "weighted_add", "concatenation"]
Past = Literal["context", "features"]


class DatasetLevelOutput(NamedTuple):
    """``features``: R_aug (B, out_channels, h, w); ``weight_logits``: of H_pr, (B, K, h, w)."""

    features: Tensor
    weight_logits: Tensor


class ContextState(NamedTuple):
    """What does not depend on the weights W: computed once per image for any number of stages.

    ``query``: the projected R (B, T, h, w), or R and C_dl projected for attention on the weights.
    ``fused``: what the fusion F_T needs from R.
    """

    query: Tensor | ClassQuery
    fused: Tensor


class ContextBase(nn.Module):
    """Computes R_aug from R and W; the base of a dataset-level context and of its folded form.

    In iterative inference several W belong to one R: they share ``prepare(R)``, and each takes one
    ``gather``.
    """

    weight_head: Decoder  # H_pr
    fuse: Any  # F_T: fuse(fuse.prepare(R), C_bi)

    def forward(
        self, features: Tensor, weight_logits: Tensor | None = None, labels: Tensor | None = None
    ) -> DatasetLevelOutput:
        """``weight_logits``, if given, gather instead of those of H_pr (iterative inference).

        Labels are of use in training alone, see :meth:`DatasetLevelContext.forward`.
        """
        predicted = self.weight_head(features)
        gathering = predicted if weight_logits is None else weight_logits
        return DatasetLevelOutput(self.augment(features, gathering), predicted)

    def augment(self, features: Tensor, weight_logits: Tensor) -> Tensor:
        """R_aug for the given logits of W."""
        return self.gather(self.prepare(features), weight_logits)

    def prepare(self, features: Tensor) -> ContextState:
        """The part of ``gather`` that depends on R (B, Z, h, w) and not on the weights."""
        return ContextState(self.project(features), self.fuse.prepare(features))

    def gather(self, state: ContextState, weight_logits: Tensor) -> Tensor:
        """R_aug (B, out_channels, h, w) for the logits of W (B, K, h, w)."""
        context = self.attend(state.query, weight_logits, state.fused.shape[2:])
        return self.fuse(state.fused, context)

    @torch.no_grad()
    def explain(self, features: Tensor, weight_logits: Tensor) -> str:
        """The form of attention and why, and :func:`mcibi_fast.explain` of the op that runs it."""
        twin = copy.deepcopy(self).eval()  # a copy: the model's batch statistics stay as they are
        op = twin._explain_attention(twin.project(features), weight_logits)
        return f"{type(self).__name__}: {': '.join(self.form())}\n{op}"

    def form(self) -> tuple[str, str]:
        """The form of attention, "class-rank" (it runs on W) or "general", and why."""
        raise NotImplementedError

    def project(self, features: Tensor) -> Any:
        """The queries from R: the part of ``attend`` that does not depend on the weights."""
        raise NotImplementedError

    def attend(self, query: Any, weight_logits: Tensor, size: torch.Size) -> Tensor:
        """C_bi, or what ``fuse`` takes instead of it, with this height and width."""
        raise NotImplementedError

    def _explain_attention(self, query: Any, weight_logits: Tensor) -> str:
        raise NotImplementedError


class DatasetLevelContext(ContextBase):
    """Pixel representations augmented with the dataset-level context (Eqs. 10-13 and 4).

    W = H_pr(R); C~_bi = softmax(W) C_dl; C_bi = attention(R, C~_bi); R_aug = F_T(R, C_bi).

    Given the labels, ``forward`` lets the optimiser's step update the memory as well.

    With linear projections ("paper"), without ``downsample`` and with no more classes than
    ``transform_channels``, C~_bi is not formed: the attention runs on W itself
    (:meth:`PositionConfidenceAttention.attend_classes`), which gives the same up to rounding.
    ``explain`` says which form runs.

    Args:
        memory: a :class:`GaussianMemory` or a :class:`RepresentationMemory`; one with several
            representations per class uses :class:`SeveralAttentions`.
        out_channels: channels of R_aug, by default those of R; only "concatenation" can change
            them.
        transform_channels: width of the attention.
        projections: see :class:`PositionConfidenceAttention`.
        fusion: F_T. "add": R + C_bi. "weighted_add": the two summed with weights that a 1x1
            convolution predicts per pixel (softmax over the two). "concatenation": Conv3x3-BN-ReLU
            on both.
        hard: gather with one-hot weights, at the largest logit, instead of the softmax.
        downsample: halve the size of R and C~_bi by a shared Conv3x3-BN-ReLU of stride 2 before the
            attention, and resize C_bi back afterwards.
        detach_weights: W learns from its own loss alone: what is gathered with it gives it no
            gradient. Not in the paper; see ``docs/results/camvid.md`` for what it brings.
        dropout: dropout probability in H_pr.
        align_corners: whether that resizing aligns corners.

    Shape: (B, Z, h, w) -> R_aug (B, out_channels, h, w) and the logits of W (B, K, h, w).
    """

    def __init__(
        self,
        memory: ClassMemory,
        *,
        out_channels: int | None = None,
        transform_channels: int = 256,
        projections: Projections = "released",
        fusion: Fusion = "concatenation",
        hard: bool = False,
        downsample: bool = False,
        detach_weights: bool = False,
        dropout: float = 0.1,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        channels = memory.channels
        self.memory = memory
        self.weight_head = Decoder(channels, channels, memory.num_classes, dropout=dropout)  # H_pr
        self.attention: Any = _attention(memory, transform_channels, projections, downsample)
        self.downsample = conv_bn_relu(channels, channels, 3, stride=2) if downsample else None
        self.fuse = _fusion(fusion, channels, out_channels or channels)
        self.hard = hard
        self.detach_weights = detach_weights
        self.align_corners = align_corners
        self._follow()

    def _follow(self) -> None:
        self.memory.keep_nothing()
        follow_optimizers(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow()

    def forward(
        self, features: Tensor, weight_logits: Tensor | None = None, labels: Tensor | None = None
    ) -> DatasetLevelOutput:
        """R_aug and the logits of W; labels update the memory in training.

        In training mode each step of an optimiser that holds a parameter of this context (any
        optimiser, if none of its parameters is learnt) updates the memory once, by all forwards
        with labels whose backward pass came since the step before. All ranks of the default process
        group pool them. A forward under ``torch.no_grad`` or without a backward pass leaves
        nothing. ``memory.update(features, labels)`` may be called instead: after a forward with
        labels it takes the place of the next step's update. An optimiser that is not a
        ``torch.optim.Optimizer`` is not noticed: call ``memory.learn()`` after its step.

        Args:
            features: R (B, Z, h, w).
            weight_logits: gather instead of those of H_pr (iterative inference).
            labels: (B, H, W), any integer dtype; they do not change what is returned.
        """
        output = super().forward(features, weight_logits)
        if labels is None or not self.training:
            return output
        return DatasetLevelOutput(*self.memory.observe(features, labels, *output))

    def aggregate(self, features: Tensor, weight_logits: Tensor) -> Tensor:
        """C_bi (B, Z, h, w), Eqs. 11-13, for given logits of W."""
        return self.attend(self.project(features), weight_logits, features.shape[2:])

    def form(self) -> tuple[str, str]:
        """The form of attention, "class-rank" (it runs on W) or "general", and why.

        With N pixels the cost is N^2 times the width of queries, keys and values, which is K for
        attention on the weights and T in general. Attention on a hard W has no cost in N^2.
        """
        K, T = self.memory.num_classes, self.attention.transform_channels
        if self.downsample is not None:
            return "general", "a stride-2 convolution comes before the attention"
        if isinstance(self.attention, SeveralAttentions):
            return "general", "each class has several representations, each with its own attention"
        if not self.attention.linear:
            return "general", "the projections have ReLU"
        if self.hard:
            return "class-rank", f"the projections are linear and each key is one of K={K} classes"
        if K > T:
            return "general", f"the projections are linear, but K={K} > T={T}"
        return "class-rank", f"the projections are linear and K={K} <= T={T}"

    def project(self, features: Tensor) -> Tensor | ClassQuery:
        if self.form()[0] == "class-rank":
            return self.attention.project_classes(features, self.memory.representations())
        return self.attention.query(self._halved(features))

    def attend(self, query: Tensor | ClassQuery, weight_logits: Tensor, size: torch.Size) -> Tensor:
        check_size(weight_logits, size)
        if self.detach_weights:
            weight_logits = weight_logits.detach()
        if isinstance(query, ClassQuery):
            return self.attention.attend_classes(query, weight_logits, hard=self.hard)
        context = self.attention.attend(query, self._coarse(weight_logits))
        return resize(context, size, self.align_corners)

    def _coarse(self, weight_logits: Tensor) -> Tensor:
        """C~_bi (Eq. 12) at the resolution that the attention uses."""
        return self._halved(self.memory.aggregate(weight_logits, hard=self.hard))

    def _halved(self, features: Tensor) -> Tensor:
        return features if self.downsample is None else self.downsample(features)

    def _explain_attention(self, query: Tensor | ClassQuery, weight_logits: Tensor) -> str:
        attention = self.attention
        if isinstance(query, ClassQuery):
            return explain_classes(query.scores, weight_logits, attention.scale, self.hard)
        keys = self._coarse(weight_logits)
        if isinstance(attention, SeveralAttentions):
            count = len(attention.parts)
            query, keys = query.chunk(count, dim=1)[0], keys.chunk(count, dim=1)[0]
            attention = attention.parts[0]
        return explain_pixels(query, attention.key(keys), attention.value(keys), attention.scale)


def _attention(
    memory: ClassMemory, transform_channels: int, projections: Projections, downsample: bool
) -> PositionConfidenceAttention | SeveralAttentions:
    count = memory.per_class
    if count == 1:
        return PositionConfidenceAttention(
            memory.channels, transform_channels, projections=projections
        )
    if downsample:
        raise ValueError(f"downsample: needs one representation per class, this memory has {count}")
    return SeveralAttentions(count, memory.channels, transform_channels, projections=projections)


def check_size(weight_logits: Tensor, size: torch.Size) -> None:
    """Raises unless the logits have the height and width of the features."""
    if weight_logits.shape[2:] != size:
        raise ValueError(
            f"weight_logits: expected the features' size {tuple(size)}, "
            f"got {tuple(weight_logits.shape[2:])}"
        )


def resize(values: Tensor, size: torch.Size, align_corners: bool) -> Tensor:
    """The values resized bilinearly, or as they are if they have this size already."""
    if values.shape[2:] == size:
        return values
    return F.interpolate(values, size, mode="bilinear", align_corners=align_corners)


class Add(nn.Module):
    """R + C_bi."""

    def prepare(self, features: Tensor) -> Tensor:
        return features

    def forward(self, features: Tensor, context: Tensor) -> Tensor:
        return features + context


class WeightedAdd(nn.Module):
    """w_0 R + w_1 C_bi, (w_0, w_1) = softmax of a 1x1 convolution on both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weights = nn.Conv2d(2 * channels, 2, 1)

    def prepare(self, features: Tensor) -> Tensor:
        return features

    def forward(self, features: Tensor, context: Tensor) -> Tensor:
        weights = self.weights(torch.cat([features, context], dim=1)).softmax(dim=1)
        return weights[:, :1] * features + weights[:, 1:] * context


class Concatenation(nn.Module):
    """Conv3x3-BN-ReLU on [R, C_bi]; ``prepare`` computes the part that does not depend on C_bi.

    For videos (Eq. 19) it runs on [R, past frames' maps, C_bi]. Eq. 19 lists them in another order,
    which makes no difference to a learnt convolution; here what changes between stages comes last.

    Args:
        channels: Z, the channels of each map.
        out_channels: channels of the result.
        history: h, the number of past frames.
        past: what is taken from them: "context", C_bi^{N-i}, or "features", R_{N-i} (Table 16).
    """

    def __init__(
        self, channels: int, out_channels: int, *, history: int = 0, past: Past = "context"
    ) -> None:
        super().__init__()
        if history < 0:
            raise ValueError(f"history: {history} past frames; expected 0 or more")
        if past not in ("context", "features"):
            raise ValueError(f"past: expected 'context' or 'features', got {past!r}")
        self.history, self.past = history, past
        self.conv = conv_bn_relu((2 + history) * channels, out_channels, 3)

    def prepare(self, features: Tensor, past: Sequence[Tensor] = ()) -> Tensor:
        """The part that R and the past frames' maps, the earliest first, contribute.

        All maps are (B, channels, h, w).

        Raises:
            ValueError: the number of past maps is not ``history``.
        """
        if len(past) != self.history:
            raise ValueError(f"past: {len(past)} maps of past frames, expected {self.history}")
        fixed = torch.cat([features, *past], dim=1) if past else features
        return self.conv.prepare(fixed, first=True)

    def forward(self, prepared: Tensor, context: Tensor) -> Tensor:
        return self.conv.join(prepared, context, first=True)


def _fusion(fusion: Fusion, channels: int, out_channels: int) -> Add | WeightedAdd | Concatenation:
    if fusion == "concatenation":
        return Concatenation(channels, out_channels)
    if out_channels != channels:
        raise ValueError(f"out_channels: fusion={fusion!r} keeps the {channels} channels of R")
    if fusion == "add":
        return Add()
    if fusion == "weighted_add":
        return WeightedAdd(channels)
    raise ValueError(f"fusion: expected 'add', 'weighted_add' or 'concatenation', got {fusion!r}")
