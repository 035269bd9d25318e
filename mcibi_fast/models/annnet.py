"""ANN (arXiv 1908.07678): attention to pooled regions of two stages as the context."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.registry import framework
from mcibi_fast.nn import within_image as contexts
from mcibi_fast.nn.decoder import Decoder


@framework("annnet", "ANN", source="arXiv 1908.07678", context="asymmetric non-local attention")
class ANNNet(SegmentationHead):
    """Asymmetric non-local attention on the last two stages, C_wi (Eq. 3), then a classifier.

    As in the released form the only channel dropout is after the fusion of the two stages: there
    is none before the classifier (with a memory there is). Unlike in the paper's code the last
    convolutions of the attentions do not start at zero.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        context_channels: channels of the queries, keys and values.
        pool_scales: regions per side at each level of the pyramid of keys and values.
        within_image: a context of your own to use instead, which takes the last map and the one
            before it.
        feats_channels: Z, channels of the context and of the pixel representations.
        dropout: channel dropout.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        context_channels: int = 256,
        pool_scales: Sequence[int] = (1, 3, 6, 8),
        within_image: nn.Module | None = None,
        feats_channels: int = 512,
        dropout: float = 0.1,
        **options: Any,
    ) -> None:
        Z = feats_channels
        context = partial(
            contexts.ANN,
            in_channels[-2],
            in_channels[-1],
            Z,
            transform_channels=context_channels,
            pool_scales=pool_scales,
            dropout=dropout,
        )
        if not self.has_memory:
            options["decoder"] = Decoder(Z, Z, num_classes, dropout=0.0, conv=nn.Identity())
        super().__init__(
            num_classes,
            in_channels,
            within_image=within_image or context,
            feats_channels=Z,
            dropout=dropout,
            **options,
        )

    def gather_within_image(
        self, features: Sequence[Tensor], R: Tensor | None, weight_logits: Tensor | None
    ) -> Tensor:
        return self.within_image(features[-1], features[-2])
