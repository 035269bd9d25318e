"""A head with a memory: pixel representations, dataset-level context, classification."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.models.head import SegmentationHead, made
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.nn.accumulation import Passes, whole_step
from mcibi_fast.nn.attention import PositionConfidenceAttention, Projections
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.class_memory import ClassMemory
from mcibi_fast.nn.context import ContextBase, ContextState, DatasetLevelContext, Fusion
from mcibi_fast.nn.decoder import Decoder, auxiliary_decoder
from mcibi_fast.nn.fold import FoldedContext, fold_batch_norms, fold_context
from mcibi_fast.nn.iterative import Mixing, label_weights, mix
from mcibi_fast.nn.losses import PixelLoss, joint_losses
from mcibi_fast.nn.memory import Form
from mcibi_fast.nn.one_logit import two_logits

WeightsFrom = Literal["auto", "pr", "cwi", "labels"]


class _Image(NamedTuple):
    """What does not depend on the weights W: computed once for any number of stages."""

    context: ContextState
    query: Tensor | None  # the extra attention's
    classifier: Any  # see MemoryHead.prepare_classifier


class _Weights(NamedTuple):
    """``predicted``: logits of H_pr; ``gather``: logits of the first stage's W.

    ``within``: C_wi; ``context_logits``: the logits that the within-image head predicts from it.
    """

    predicted: Tensor
    gather: Tensor
    within: Tensor | None
    context_logits: Tensor | None

    def last(self, count: int) -> _Weights:
        """The same for the last ``count`` maps of the batch."""
        rest = (None if m is None else m[-count:] for m in (self.within, self.context_logits))
        return _Weights(self.predicted[-count:], self.gather[-count:], *rest)


class MemoryHead(SegmentationHead):
    """Augments the last stage's features with dataset-level context and classifies them (Eqs. 1-5).

    Args:
        num_classes: K; 1 for one logit (`mcibi_fast.nn.one_logit`). W and the memory then have two
            classes, and the prediction one logit.
        in_channels: channels of the backbone's feature maps, finest first; the last one feeds
            the head, the one before it the auxiliary head.
        memory: the memory of K classes and Z channels that the context is gathered from.
        form: "released" (published checkpoints) or "paper" (the equations as printed); sets
            ``projections`` and ``mixing``, each of which can also be given separately.
        feats_channels: Z, channels of the pixel representations.
        transform_channels: width of the attention.
        dropout: channel dropout before each classifier.
        alpha: weight of L_W (Eq. 16).
        auxiliary_weight: weight of the auxiliary head's loss; 0 leaves the head out.
        auxiliary_heads: number of auxiliary heads, on as many maps before the last. Several are
            :class:`mcibi_fast.nn.decoder.UpsamplingDecoder`, for maps of stride 16 (ViT).
        within_image: A_wi (Eq. 3), a module from the last feature map to (B, Z, h, w), or a
            function that makes it. A separate head classifies its output, which is also
            concatenated to R_aug before the final classifier.
        extra_attention: adds an attention that the paper does not have but some published
            checkpoints do: its query is the context within the image, its key R_aug, and its result
            replaces R_aug before the classifier.
        kernel_sizes: kernel sizes of the first convolutions of H_pr, of the head on the
            within-image context and of the final classifier; published checkpoints differ in them.
            By default (1, 1, 3), and (1, 1, 1) without a within-image context (the second is then
            not used).
        weights_from: whose logits are used as W: "pr" (H_pr) or "cwi" (the within-image head).
            "auto" is "cwi" for the released form with a within-image context, "pr" otherwise.
            "labels": the one-hot ground truth (GT-MCIBI++, Table 1), where ignored pixels take the
            class that H_pr predicts. Training and evaluation then need labels, and further stages
            would change nothing.
        fusion, hard, downsample, detach_weights: see :class:`DatasetLevelContext`; the fusion is
            F_T.
        projections: projections of the attention, see :class:`PositionConfidenceAttention`.
        stages: stages of iterative inference if ``forward`` gets no number; 1 means no iteration.
        mixing: how the next stage's weights are computed. "paper": Eq. 17 on probabilities.
            "released": (a W + b O) / (a + b - 1) on logits.
        stage_weights: (a, b) of the released mixing.
        ignore_index: label that counts neither in the losses nor in the memory.
        align_corners: whether every bilinear resizing aligns corners.
        loss: the loss of every classifier's logits; by default plain cross entropy.
    """

    has_memory = True

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        memory: ClassMemory,
        form: Form = "released",
        feats_channels: int = 512,
        transform_channels: int = 256,
        dropout: float = 0.1,
        alpha: float = 0.4,
        auxiliary_weight: float = 0.4,
        auxiliary_heads: int = 1,
        within_image: nn.Module | Callable[[], nn.Module] | None = None,
        extra_attention: bool = False,
        kernel_sizes: Sequence[int] | None = None,
        weights_from: WeightsFrom = "auto",
        fusion: Fusion = "concatenation",
        hard: bool = False,
        downsample: bool = False,
        detach_weights: bool = False,
        projections: Projections | None = None,
        stages: int = 1,
        mixing: Mixing | None = None,
        stage_weights: tuple[float, float] = (2.0, 1.5),
        ignore_index: int = IGNORE_INDEX,
        align_corners: bool = False,
        loss: PixelLoss | None = None,
    ) -> None:
        super().__init__()
        Z, K = feats_channels, memory.num_classes
        if within_image is not None:
            within_image = made(within_image)
        self.bottleneck = conv_bn_relu(in_channels[-1], Z, 3)
        self.context: ContextBase = DatasetLevelContext(
            memory,
            transform_channels=transform_channels,
            projections=projections or form,
            fusion=fusion,
            hard=hard or weights_from == "labels",
            downsample=downsample,
            detach_weights=detach_weights,
            dropout=dropout,
            align_corners=align_corners,
        )
        self.within_image = within_image
        if extra_attention and within_image is None:
            raise ValueError("extra_attention: needs a within-image context; this model has none")
        self.extra_attention = (
            PositionConfidenceAttention(Z, transform_channels, projections=projections or form)
            if extra_attention
            else None
        )
        pr, cwi, cls = _kernel_sizes(kernel_sizes, within_image is not None)
        if pr != 1:
            self.context.weight_head = Decoder(Z, Z, K, kernel_size=pr, dropout=dropout)
        self.within_image_head, width = None, Z
        if within_image is not None:
            self.within_image_head = Decoder(Z, Z, K, kernel_size=cwi, dropout=dropout)
            width = 2 * Z
        self.decoder = Decoder(width, Z, num_classes, kernel_size=cls, dropout=dropout)
        self.auxiliary = None
        if auxiliary_weight:
            self.auxiliary = auxiliary_decoder(
                in_channels, Z, num_classes, count=auxiliary_heads, dropout=dropout
            )
        self.weights_from = _weights_from(weights_from, form, within_image is not None)
        self.mixing = mixing or form
        if self.mixing not in ("paper", "released"):
            raise ValueError(f"mixing: expected 'paper' or 'released', got {mixing!r}")
        self.num_classes = num_classes
        self.stages = stages
        self.stage_weights = stage_weights
        self.alpha = alpha
        self.auxiliary_weight = auxiliary_weight
        self.ignore_index = ignore_index
        self.align_corners = align_corners
        self.loss = loss or PixelLoss()
        self._passes: Passes = []  # under gradient accumulation

    @property
    def needs_labels(self) -> bool:
        """Whether evaluation needs labels as well as training."""
        return self.weights_from == "labels"

    def schedule(self, *, epoch: int, lr_factor: float) -> None:
        """Prepares the next training step; see :meth:`Segmentor.schedule`."""
        self.memory.schedule(lr_factor=lr_factor)

    @property
    def memory(self) -> ClassMemory:
        """The context's memory; a folded head does not have this attribute."""
        return cast(DatasetLevelContext, self.context).memory

    def fold(self) -> MemoryHead:
        """A copy for inference, in evaluation mode, equal up to rounding.

        Batch norms are folded into their convolutions, and the class representations into tables
        (:mod:`mcibi_fast.nn.fold`). The copy cannot be trained.
        """
        folded = copy.deepcopy(self).eval()
        if isinstance(folded.context, DatasetLevelContext):
            fold_batch_norms(folded)
            folded.context = fold_context(folded.context)
        return folded.requires_grad_(False)

    def train(self, mode: bool = True) -> MemoryHead:
        """Switches to training mode, or to evaluation mode.

        Raises:
            RuntimeError: training mode for a folded head.
        """
        if mode:
            self._refuse_if_folded()
        else:
            self._passes.clear()  # of a step that was not finished
        return super().train(mode)

    def _refuse_if_folded(self) -> None:
        if isinstance(self.context, FoldedContext):
            raise RuntimeError(
                "a folded model is for inference and cannot be trained: its batch norms and its "
                "memory are folded into the weights; train the model that fold() was called on"
            )

    def pixel_representations(self, features: Sequence[Tensor]) -> Tensor:
        """R (B, Z, h, w)."""
        return self.bottleneck(features[-1])

    def forward(  # type: ignore[override]
        self,
        features: Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        previous_logits: Tensor | None = None,
        stages: int | None = None,
    ) -> SegmentationOutput:
        """Classifies; labels add the losses and, in training mode, the update of the memory.

        Args:
            features: the backbone's maps, finest first.
            labels: (B, H, W), any integer dtype; needed with ``weights_from="labels"``.
            previous_logits: O of an earlier stage (B, K, h', w'); this pass is then the next stage.
            stages: number of stages of iterative inference in evaluation mode (section 3.5).
                Training always has one.

        Raises:
            ValueError: labels are needed and there are none, or ``stages`` is less than 1.
        """
        if self.training:
            self._refuse_if_folded()
        R = self._run(self.pixel_representations, features)
        weights = self._weights(features, R, self._run(self.context.weight_head, R))  # W, Eq. 10
        image = self._prepare(features, self._run(self.context.prepare, R), weights.within)
        if self.needs_labels:
            gather = label_weights(labels, weights.predicted, ignore_index=self.ignore_index)
        elif previous_logits is None:
            gather = weights.gather
        else:
            gather = self.next_weights(weights.gather, previous_logits)
        logits = self._stage(image, gather)
        if not self.needs_labels:
            logits = self._iterate(image, weights.gather, logits, stages)
        return self._output(features, R, labels, logits, weights, image)

    def _weights(self, features: Sequence[Tensor], R: Tensor, predicted: Tensor) -> _Weights:
        """The first stage's W: logits of H_pr, or those of the head on the within-image context."""
        within = self._run(self.within_image_context, features, R, predicted)
        context_logits = None
        if within is not None and self.within_image_head is not None:
            context_logits = self._run(self.within_image_head, within)
        gather = predicted
        if self.weights_from == "cwi" and context_logits is not None:
            gather = context_logits
        return _Weights(predicted, gather, within, context_logits)

    def _prepare(
        self, features: Sequence[Tensor], context: ContextState, within: Tensor | None
    ) -> _Image:
        """Computes once what does not depend on W; each stage computes the rest."""
        query = None
        if self.extra_attention is not None:
            query = self._run(self.extra_attention.query, within)
        return _Image(context, query, self._run(self.prepare_classifier, features, within))

    def _stage(self, image: _Image, weight_logits: Tensor) -> Tensor:
        augmented = self._run(self.context.gather, image.context, weight_logits)
        return self._classify(image, augmented)

    def _classify(self, image: _Image, augmented: Tensor) -> Tensor:
        """O before the upsampling, computed from the result of F_T (Eqs. 4 and 5)."""
        if self.extra_attention is not None and image.query is not None:
            augmented = self._run(self.extra_attention.attend, image.query, augmented)
        return self._run(self.classify, augmented, image.classifier)

    def _iterate(self, image: _Image, gather: Tensor, logits: Tensor, stages: int | None) -> Tensor:
        """The stages after the first, in evaluation (section 3.5)."""
        if self.training:
            return logits
        stages = self.stages if stages is None else stages
        if stages < 1:
            raise ValueError(f"stages: expected at least 1, got {stages}")
        for _ in range(1, stages):
            logits = self._stage(image, self.next_weights(gather, logits))
        return logits

    def _output(
        self,
        features: Sequence[Tensor],
        R: Tensor,
        labels: Tensor | None,
        logits: Tensor,
        weights: _Weights,
        image: _Image,
    ) -> SegmentationOutput:
        """The output; labels add the losses and, in training mode, the update of the memory."""
        finished, further = self.finish(logits, image.classifier, labels)
        losses = {}
        if labels is not None:
            losses = joint_losses(
                logits,
                labels,
                weight_logits=weights.predicted,
                context_logits=weights.context_logits,
                auxiliary_logits=self._auxiliary_logits(features),
                alpha=self.alpha,
                auxiliary_weight=self.auxiliary_weight,
                ignore_index=self.ignore_index,
                align_corners=self.align_corners,
                loss=self.loss,
            )
            losses |= further
            if self.training:
                self._learn(R.detach(), labels)
                losses |= self.memory_losses(R.dtype)
        return SegmentationOutput(finished, losses, weights.predicted, weights.context_logits)

    def _learn(self, R: Tensor, labels: Tensor) -> None:
        """Updates the memory, with gradient accumulation once for all passes of a step."""
        batch = whole_step(self._passes, R, labels, align_corners=self.align_corners)
        if batch is not None:
            self.memory.update(*batch)

    def within_image_context(
        self, features: Sequence[Tensor], R: Tensor, weight_logits: Tensor
    ) -> Tensor | None:
        """C_wi (B, Z, h, w), Eq. 3; None for a framework without a context."""
        if self.within_image is None:
            return None
        return self.gather_within_image(features, R, weight_logits)

    def prepare_classifier(self, features: Sequence[Tensor], within: Tensor | None) -> Any:
        """What ``classify`` needs besides R_aug, computed once for several stages."""
        return None if within is None else self.decoder.prepare(self.expand(features, within))

    def classify(self, augmented: Tensor, prepared: Any) -> Tensor:
        """O before the upsampling (Eq. 5), computed from R_aug (B, Z, h, w)."""
        return self.decoder(augmented, prepared)

    def finish(
        self, logits: Tensor, prepared: Any, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What a framework adds after the last stage: further losses, and corrections of O.

        Args:
            logits: O of the last stage, before the upsampling.
            prepared: the result of ``prepare_classifier``.
            labels: (B, H, W), or None.

        Returns:
            The logits of the output, and the weighted losses by their names; none without labels.
        """
        return logits, {}

    def memory_losses(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Loss terms on what the memory holds after its update, in the features' dtype.

        A subclass may add some.
        """
        return {}

    def next_weights(self, weight_logits: Tensor, logits: Tensor) -> Tensor:
        """Logits of the next stage's W (Eq. 17): a mixture of the first stage's W and this O."""
        return mix(
            self.mixing,
            weight_logits,
            two_logits(logits),
            weights=self.stage_weights,
            align_corners=self.align_corners,
        )


def _weights_from(choice: WeightsFrom, form: Form, has_within_image: bool) -> str:
    if choice not in ("auto", "pr", "cwi", "labels"):
        raise ValueError(f"weights_from: expected 'auto', 'pr', 'cwi' or 'labels', got {choice!r}")
    if choice == "cwi" and not has_within_image:
        raise ValueError("weights_from: 'cwi' needs a within-image context; this model has none")
    if choice == "auto":
        return "cwi" if has_within_image and form == "released" else "pr"
    return choice


def _kernel_sizes(sizes: Sequence[int] | None, has_within_image: bool) -> Sequence[int]:
    if sizes is None:
        return (1, 1, 3) if has_within_image else (1, 1, 1)
    if len(sizes) != 3 or any(size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(f"kernel_sizes: expected three odd sizes (pr, cwi, cls), got {sizes}")
    return sizes
