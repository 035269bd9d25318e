"""DeepLabV3+ (arXiv 1802.02611): a separable ASPP and a decoder on the finest map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.blocks import conv_bn_relu, separable_conv
from mcibi_fast.nn.context import resize
from mcibi_fast.nn.decoder import Decoder
from mcibi_fast.nn.within_image import ASPP


@framework(
    "deeplabv3plus", "DeepLabV3+", source="arXiv 1802.02611", context="atrous pyramid pooling"
)
class DeepLabV3Plus(SegmentationHead):
    """ASPP with separable convolutions (C_wi, Eq. 3), a decoder on the finest map, a classifier.

    The decoder takes the context, resized to the finest map, and a few channels of that map:
    two separable 3x3 convolutions. With MCIBI++ the context is [R_aug, C_wi]; with MCIBI the
    classifier's Conv3x3-BN-ReLU on these maps and R_aug takes the decoder's place. The paper has
    neither.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        dilations: dilation of each branch; 1 is a 1x1 convolution.
        shortcut_channels: channels of the finest map in the decoder.
        within_image: a context of your own to use instead of the ASPP.
        feats_channels: Z, channels of the context and of the pixel representations.
        dropout: channel dropout before each classifier.
        align_corners: whether every bilinear resizing aligns corners.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.

    The logits have the size of the finest map.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        dilations: Sequence[int] = (1, 12, 24, 36),
        shortcut_channels: int = 48,
        within_image: nn.Module | None = None,
        feats_channels: int = 512,
        dropout: float = 0.1,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        Z = feats_channels
        width = Z + shortcut_channels  # channels of what `expand` returns
        context = partial(
            ASPP,
            in_channels[-1],
            Z,
            dilations=dilations,
            separable=True,
            align_corners=align_corners,
        )
        if not self.concatenates_context:
            options["within_channels"] = width
        super().__init__(
            num_classes,
            in_channels,
            within_image=within_image or context,
            feats_channels=Z,
            dropout=dropout,
            align_corners=align_corners,
            **options,
        )
        self.shortcut = conv_bn_relu(in_channels[0], shortcut_channels, 1)
        if not self.has_memory or self.concatenates_context:
            refine = nn.Sequential(
                separable_conv(width + Z * self.concatenates_context, Z), separable_conv(Z, Z)
            )
            self.decoder: Any = Decoder(width, Z, num_classes, dropout=dropout, conv=refine)

    def expand(self, features: Sequence[Tensor], within: Tensor) -> Tensor:
        fine = self.shortcut(features[0])
        return torch.cat([resize(within, fine.shape[2:], self.align_corners), fine], dim=1)

    def prepare_classifier(self, features: Sequence[Tensor], within: Tensor | None) -> Any:
        """See :meth:`MemoryHead.prepare_classifier`."""
        assert within is not None
        if self.concatenates_context:
            return self.expand(features, within)
        memory: Any = super()
        return memory.prepare_classifier(features, within)

    def classify(self, augmented: Tensor, prepared: Any) -> Tensor:
        """See :meth:`MemoryHead.classify`."""
        if self.concatenates_context:
            augmented = resize(augmented, prepared.shape[2:], self.align_corners)
            return self.decoder(torch.cat([augmented, prepared], dim=1))
        memory: Any = super()
        return memory.classify(augmented, prepared)
