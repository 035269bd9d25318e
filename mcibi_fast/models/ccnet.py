"""CCNet (arXiv 1811.11721): criss-cross attention as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mcibi_fast.models.context_framework import ContextFramework
from mcibi_fast.models.registry import framework
from mcibi_fast.nn import within_image as contexts


@framework("ccnet", "CCNet", source="arXiv 1811.11721", context="criss-cross attention")
class CCNet(ContextFramework):
    """Recurrent criss-cross attention over a reduced last stage, C_wi (Eq. 3), then a classifier.

    The scores are those of h + w - 1 pixels for each pixel, never of all pairs.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        recurrence: number of passes of the attention.
        reduction: queries and keys have Z // reduction channels.
        options: those of :class:`ContextFramework`, and of :class:`PlainHead`,
            :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        recurrence: int = 2,
        reduction: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            context=partial(contexts.CCNet, recurrence=recurrence, reduction=reduction),
            **options,
        )
