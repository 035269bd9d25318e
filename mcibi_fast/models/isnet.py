"""ISNet (arXiv 2108.12382): image-level and semantic-level context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.blocks import ConvBNReLU
from mcibi_fast.nn.context import resize
from mcibi_fast.nn.decoder import Decoder
from mcibi_fast.nn.within_image import ISNetContext


@framework("isnet", "ISNet", source="arXiv 2108.12382", context="image and semantic level")
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
        shortcut_channels: if not 0, Conv1x1-BN-ReLU to so many channels on the finest map, whose
            result the classifier takes beside the context, both at the finest map's size (as in the
            published checkpoints for LIP, which have 48). Only without a memory.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.

    Raises:
        TypeError: ``shortcut_channels`` with a memory.
    """

    one_logit = False

    guided = True
    shortcut: Any

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        within_image: nn.Module | None = None,
        feats_channels: int = 512,
        transform_channels: int = 256,
        shortcut_channels: int = 0,
        dropout: float = 0.1,
        **options: Any,
    ) -> None:
        Z = feats_channels
        if self.has_memory:
            options["transform_channels"] = transform_channels
            if shortcut_channels:
                raise TypeError("shortcut_channels: only ISNet without a memory has this option")
        if shortcut_channels:
            options["decoder"] = Decoder(Z + shortcut_channels, Z, num_classes, dropout=dropout)
        super().__init__(
            num_classes,
            in_channels,
            within_image=within_image or partial(ISNetContext, Z, transform_channels),
            feats_channels=Z,
            dropout=dropout,
            **options,
        )
        self.shortcut = None
        if shortcut_channels:
            self.shortcut = ConvBNReLU(
                nn.Conv2d(
                    in_channels[0], shortcut_channels, 1
                ),  # with bias, as in the released code
                nn.BatchNorm2d(shortcut_channels),
                nn.ReLU(inplace=True),
            )

    def gather_within_image(
        self, features: Sequence[Tensor], R: Tensor | None, weight_logits: Tensor | None
    ) -> Tensor:
        return self.within_image(R, weight_logits)

    def expand(self, features: Sequence[Tensor], within: Tensor) -> Tensor:
        if self.shortcut is None:
            return within
        fine = self.shortcut(features[0])
        return torch.cat([resize(within, fine.shape[2:], self.align_corners), fine], dim=1)
