"""NonLocal (arXiv 1711.07971): attention over all pixels as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mcibi_fast.models.context_framework import ContextFramework
from mcibi_fast.models.registry import framework
from mcibi_fast.nn import within_image as contexts


@framework("nonlocalnet", "NonLocal", source="arXiv 1711.07971", context="non-local attention")
class NonLocalNet(ContextFramework):
    """Non-local attention over a reduced last stage, C_wi (Eq. 3), then a classifier.

    Unlike in the paper, which adds such blocks to a network for videos, there is one of them, on
    the last stage; and the last convolution of the block does not start at zero.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        reduction: the attention has Z // reduction channels.
        options: those of :class:`ContextFramework`, and of :class:`PlainHead`,
            :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        reduction: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            context=partial(contexts.NonLocal, reduction=reduction),
            **options,
        )
