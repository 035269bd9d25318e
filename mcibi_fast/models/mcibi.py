"""The head of MCIBI, whose memory holds class representations themselves.

MCIBI (ICCV 2021, arXiv 2108.11819) is the predecessor of MCIBI++; Table 3 calls its memory
"Memory-R". Structure, losses and defaults are those of the released code (sssegmentation,
``mcibi``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.models.head import made
from mcibi_fast.models.memory_head import MemoryHead, WeightsFrom
from mcibi_fast.nn.attention import PositionConfidenceAttention, Projections
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.class_memory import Init, MomentumSchedule
from mcibi_fast.nn.context import resize
from mcibi_fast.nn.memory import Form
from mcibi_fast.nn.one_logit import classes_of_memory
from mcibi_fast.nn.representation_memory import RepresentationMemory, Strategy


class MCIBIHead(MemoryHead):
    """MCIBI's head. It differs from that of MCIBI++ in the memory and in three more points.

    * A within-image context is not concatenated before the classifier: an attention relates it to
      R (query R, key C_wi), and Conv3x3-BN-ReLU fuses the result with R_aug into Z channels. The
      context has no classifier and no loss of its own.
    * The final classifier therefore takes Z channels and can also classify what the memory holds.
      From the second epoch on (``schedule`` passes the epoch) ``loss_memory`` is the cross entropy
      of all K n representations, each with its class as the target. As in the released code, this
      includes classes that were never seen, and the classifier's batch norm treats the
      representations as a batch.
    * The momentum of 0.9 follows the learning rate (which ``schedule`` passes).

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first; the last one feeds
            the head, the one before it the auxiliary head.
        form: "released" or "paper" for the projections and the mixing, see :class:`MemoryHead`.
        feats_channels: Z, channels of the pixel representations.
        transform_channels: width of the attentions.
        dropout: channel dropout before each classifier.
        within_image: A_wi, a module from the last feature map to (B, Z, h, w), or a function that
            makes it.
        within_channels: channels of the output of ``expand``, if not Z.
        representations: n, per class; with several, each has its own attention, and
            Conv1x1-BN-ReLU joins them (:class:`mcibi_fast.nn.SeveralAttentions`).
        strategy: what the memory moves towards: "cosine_similarity" or, for n = 1, "mean".
        momentum, momentum_schedule, init, seed: see :class:`RepresentationMemory`.
        memory_update: whether training changes representations that are set (Table 3).
        memory_loss_weight: weight of ``loss_memory``; 0 leaves it out.
        weights_from: see :class:`MemoryHead`; "cwi" is not possible, as there is no within-image
            head.
        ignore_index: label that counts neither in the losses nor in the memory.
        align_corners: whether every bilinear resizing aligns corners.
        options: further options of :class:`MemoryHead`: ``alpha``, ``auxiliary_weight``,
            ``fusion``, ``hard``, ``downsample``, ``detach_weights``, ``stages``, ``mixing``,
            ``stage_weights``.

    Attributes:
        memory_loss_due: whether ``schedule`` was called for the second epoch or a later one.
    """

    context_attention: PositionConfidenceAttention | None
    context_fuse: Any

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        form: Form = "released",
        feats_channels: int = 512,
        transform_channels: int = 256,
        dropout: float = 0.1,
        projections: Projections | None = None,
        within_image: nn.Module | Callable[[], nn.Module] | None = None,
        within_channels: int | None = None,
        representations: int = 1,
        strategy: Strategy = "cosine_similarity",
        momentum: float = 0.9,
        momentum_schedule: MomentumSchedule = "poly",
        memory_update: bool = True,
        init: Init = "standard",
        seed: int = 0,
        memory_loss_weight: float = 1.0,
        weights_from: WeightsFrom = "auto",
        ignore_index: int = IGNORE_INDEX,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        Z = feats_channels
        if within_image is not None:
            within_image = made(within_image)
        if weights_from == "cwi":
            raise ValueError(
                "weights_from: 'cwi' needs a within-image head, which MCIBI does not have"
            )
        memory = RepresentationMemory(
            classes_of_memory(num_classes),
            Z,
            representations,
            strategy=strategy,
            momentum=momentum,
            momentum_schedule=momentum_schedule,
            fixed=not memory_update,
            init=init,
            seed=seed,
            ignore_index=ignore_index,
            align_corners=align_corners,
        )
        super().__init__(
            num_classes,
            in_channels,
            memory=memory,
            form=form,
            feats_channels=Z,
            transform_channels=transform_channels,
            dropout=dropout,
            projections=projections,
            weights_from="pr" if weights_from == "auto" else weights_from,
            ignore_index=ignore_index,
            align_corners=align_corners,
            **options,
        )
        self.within_image = within_image
        self.context_attention = self.context_fuse = None
        if within_image is not None:
            self.context_attention = PositionConfidenceAttention(
                Z, transform_channels, projections=projections or form
            )
            self.context_fuse = conv_bn_relu((within_channels or Z) + Z, Z, 3)
        self.memory_loss_weight = memory_loss_weight
        self.memory_loss_due = False

    def schedule(self, *, epoch: int, lr_factor: float) -> None:
        super().schedule(epoch=epoch, lr_factor=lr_factor)
        self.memory_loss_due = epoch >= 1

    def within_image_context(
        self, features: Sequence[Tensor], R: Tensor, weight_logits: Tensor
    ) -> Tensor | None:
        """C_wi after the attention that relates it to R (B, Z, h, w); None without a context."""
        if self.within_image is None or self.context_attention is None:
            return None
        return self.context_attention(R, self.gather_within_image(features, R, weight_logits))

    def prepare_classifier(self, features: Sequence[Tensor], within: Tensor | None) -> Any:
        if within is None:
            return None
        return self.context_fuse.prepare(self.expand(features, within), first=True)

    def classify(self, augmented: Tensor, prepared: Any) -> Tensor:
        if prepared is not None:
            augmented = resize(augmented, prepared.shape[2:], self.align_corners)
            augmented = self.context_fuse.join(prepared, augmented, first=True)
        return self.decoder(augmented)

    def memory_losses(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """``loss_memory`` from the second epoch on; with a single class it would be zero."""
        if not (self.memory_loss_due and self.memory_loss_weight and self.memory.num_classes > 1):
            return {}
        K, n, _ = self.memory.memory.shape
        memory = cast(RepresentationMemory, self.memory)
        vectors = memory.read(after_update=True).flatten(0, 1).to(dtype)  # (K n, Z)
        logits = self.decoder(vectors[:, :, None, None]).flatten(1)
        classes = torch.arange(K * n, device=logits.device) // n
        return {"loss_memory": self.memory_loss_weight * F.cross_entropy(logits, classes)}
