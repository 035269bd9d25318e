"""PSPNet (arXiv 1612.01105): pyramid pooling as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mcibi_fast.models.context_framework import ContextFramework
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.within_image import PPM


@framework("pspnet", "PSPNet", source="arXiv 1612.01105", context="pyramid pooling")
class PSPNet(ContextFramework):
    """Pyramid pooling of the last stage, C_wi (Eq. 3), then a classifier.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        pool_scales: regions per side at each level of the pyramid; one branch for each.
        align_corners: whether every bilinear resizing aligns corners.
        options: those of :class:`ContextFramework`, and of :class:`PlainHead`,
            :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            context=partial(PPM, pool_scales=pool_scales, align_corners=align_corners),
            align_corners=align_corners,
            **options,
        )
