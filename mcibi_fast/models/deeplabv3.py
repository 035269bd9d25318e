"""DeepLabV3 (arXiv 1706.05587): atrous spatial pyramid pooling as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mcibi_fast.models.context_framework import ContextFramework
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.within_image import ASPP


@framework("deeplabv3", "DeepLabV3", source="arXiv 1706.05587", context="atrous pyramid pooling")
class DeepLabV3(ContextFramework):
    """Atrous spatial pyramid pooling of the last stage, C_wi (Eq. 3), then a classifier.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        dilations: dilation of each branch; 1 is a 1x1 convolution.
        align_corners: whether every bilinear resizing aligns corners.
        options: those of :class:`ContextFramework`, and of :class:`PlainHead`,
            :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        dilations: Sequence[int] = (1, 12, 24, 36),
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            context=partial(ASPP, dilations=dilations, align_corners=align_corners),
            align_corners=align_corners,
            **options,
        )
