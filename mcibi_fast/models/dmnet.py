"""DMNet (ICCV 2019): dynamic multi-scale filters as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mcibi_fast.models.context_framework import ContextFramework
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.within_image import DMNet as Context


@framework("dmnet", "DMNet", source="ICCV 2019", context="dynamic multi-scale filters")
class DMNet(ContextFramework):
    """Convolutions with kernels that the image predicts, C_wi (Eq. 3), then a classifier.

    As in the released code, no 1x1 convolution follows the dynamic ones, which the paper has.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        filter_sizes: sides of the predicted kernels; one branch for each.
        options: those of :class:`ContextFramework`, and of :class:`PlainHead`,
            :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        filter_sizes: Sequence[int] = (1, 3, 5, 7),
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            context=partial(Context, filter_sizes=filter_sizes),
            **options,
        )
