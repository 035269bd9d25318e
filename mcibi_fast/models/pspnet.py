"""PSPNet (arXiv 1612.01105): pyramid pooling as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.within_image import PPM


@framework("pspnet", "PSPNet")
class PSPNet(SegmentationHead):
    """Pyramid pooling of the last stage, C_wi (Eq. 3), then a classifier.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        pool_scales: regions per side at each level of the pyramid; one branch for each.
        within_image: a context of your own to use instead of the pyramid.
        feats_channels: Z, channels of the context and of the pixel representations.
        align_corners: whether every bilinear resizing aligns corners.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        within_image: nn.Module | None = None,
        feats_channels: int = 512,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        context = partial(
            PPM,
            in_channels[-1],
            feats_channels,
            pool_scales=pool_scales,
            align_corners=align_corners,
        )
        super().__init__(
            num_classes,
            in_channels,
            within_image=within_image or context,
            feats_channels=feats_channels,
            align_corners=align_corners,
            **options,
        )
