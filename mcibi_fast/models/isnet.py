"""ISNet (arXiv 2108.12382): image-level and semantic-level context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.within_image import ISNetContext


@framework("isnet", "ISNet")
class ISNet(SegmentationHead):
    """R, a first prediction on it, the two contexts of both, and a classifier on these.

    The paper's Table 9 has ISNet with MCIBI++, but neither says how it is put together nor was it
    ever released; the same goes for MCIBI. Chosen here: both parts begin alike, with
    Conv3x3-BN-ReLU to R and a prediction on R, so they share them. H_pr's logits also guide the
    semantic-level context; that context is C_wi, as any other context within the image is.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        within_image: a context of your own, which takes R and the first prediction's logits.
        feats_channels: Z, channels of R and of the contexts.
        transform_channels: width of the contexts' attentions, and of the memory's.
        options: more of :class:`PlainHead`'s, :class:`MCIBIPPHead`'s or :class:`MCIBIHead`'s.
    """

    guided = True

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        within_image: nn.Module | None = None,
        feats_channels: int = 512,
        transform_channels: int = 256,
        **options: Any,
    ) -> None:
        if self.has_memory:
            options["transform_channels"] = transform_channels
        super().__init__(
            num_classes,
            in_channels,
            within_image=within_image or partial(ISNetContext, feats_channels, transform_channels),
            feats_channels=feats_channels,
            **options,
        )

    def gather_within_image(
        self, features: Sequence[Tensor], R: Tensor | None, weight_logits: Tensor | None
    ) -> Tensor:
        return self.within_image(R, weight_logits)
