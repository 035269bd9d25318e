"""OCRNet (arXiv 1909.11065): object-contextual representations as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.within_image import ObjectContext


@framework("ocrnet", "OCRNet", source="arXiv 1909.11065", context="object regions")
class OCRNet(SegmentationHead):
    """R, object regions from coarse logits, an attention on them, and a classifier.

    The coarse logits are those of the auxiliary head, which is therefore also computed in
    evaluation; without that head (``auxiliary_weight=0``) a classifier on R predicts them, and its
    loss is ``loss_pr``. With a memory they are the logits of H_pr, and the context is C_wi.

    As in the released code, R and the context are fused by a 3x3 convolution (1x1 in the paper),
    nothing is dropped out by default, and coarse logits pass gradients on. Coarse logits of another
    size are resized, which the package in the registry omits.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        within_image: a context of your own that takes R and the coarse logits.
        feats_channels: Z, channels of R and of the context.
        transform_channels: width of the attentions, both within the image and to the memory.
        dropout: channel dropout before each classifier.
        align_corners: whether every bilinear resizing aligns corners.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    one_logit = False

    guided = True
    guided_by_auxiliary = True

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        within_image: nn.Module | None = None,
        feats_channels: int = 512,
        transform_channels: int = 256,
        dropout: float = 0.0,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        if self.has_memory:
            options["transform_channels"] = transform_channels
        context = partial(
            ObjectContext, feats_channels, transform_channels, align_corners=align_corners
        )
        super().__init__(
            num_classes,
            in_channels,
            within_image=within_image or context,
            feats_channels=feats_channels,
            dropout=dropout,
            align_corners=align_corners,
            **options,
        )

    def gather_within_image(
        self, features: Sequence[Tensor], R: Tensor | None, weight_logits: Tensor | None
    ) -> Tensor:
        return self.within_image(R, weight_logits)
