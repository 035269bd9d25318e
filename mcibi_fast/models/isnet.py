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
    """R, a first prediction from R, image-level and semantic-level context, and a classifier.

    The paper's Table 9 has ISNet with MCIBI++, but the paper does not say how the two are combined,
    and the model was never released; the same holds for ISNet with MCIBI. The choice made here:
    ISNet and the memory's part both begin with Conv3x3-BN-ReLU to R and a prediction from R, so
    they share these. The logits of H_pr also guide the semantic-level context, and that context is
    C_wi, as in any other framework.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        within_image: a context of your own that takes R and the logits of the first prediction.
        feats_channels: Z, channels of R and of the contexts.
        transform_channels: width of the attentions, both within the image and to the memory.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.
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
