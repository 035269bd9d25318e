"""EMANet (arXiv 1907.13426): expectation-maximisation attention as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mcibi_fast.models.context_framework import ContextFramework
from mcibi_fast.models.registry import framework
from mcibi_fast.nn import within_image as contexts
from mcibi_fast.nn.within_image.emanet import BASES_MOMENTUM


@framework("emanet", "EMANet", source="arXiv 1907.13426", context="expectation maximisation")
class EMANet(ContextFramework):
    """Expectation-maximisation attention over a reduced last stage (C_wi), then a classifier.

    No gradient flows through the iterations, so the convolution before them cannot learn; as in the
    released form it keeps its random initial weights.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        bases, iterations: see :class:`mcibi_fast.nn.within_image.emanet.EMABlock`.
        bases_momentum: its momentum.
        options: those of :class:`ContextFramework`, and of :class:`PlainHead`,
            :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        bases: int = 64,
        iterations: int = 3,
        bases_momentum: float = BASES_MOMENTUM,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            context=partial(
                contexts.EMANet, bases=bases, iterations=iterations, momentum=bases_momentum
            ),
            **options,
        )
