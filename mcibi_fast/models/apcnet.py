"""APCNet (CVPR 2019): adaptive pyramid context as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mcibi_fast.models.context_framework import ContextFramework
from mcibi_fast.models.registry import framework
from mcibi_fast.nn import within_image as contexts


@framework("apcnet", "APCNet", source="CVPR 2019", context="adaptive pyramid")
class APCNet(ContextFramework):
    """Adaptive pyramid context of the last stage, C_wi (Eq. 3), then a classifier.

    The affinities of a pixel to the regions are sigmoids; as in the released form their sum is not
    normalised.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        pool_scales: regions per side; one adaptive context for each.
        options: those of :class:`ContextFramework`, and of :class:`PlainHead`,
            :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            context=partial(contexts.APCNet, pool_scales=pool_scales),
            **options,
        )
