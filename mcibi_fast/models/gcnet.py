"""GCNet (arXiv 1904.11492): one vector for the whole image as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mcibi_fast.models.context_framework import ContextFramework
from mcibi_fast.models.registry import framework
from mcibi_fast.nn import within_image as contexts


@framework("gcnet", "GCNet", source="arXiv 1904.11492", context="global context")
class GCNet(ContextFramework):
    """A global context added to a reduced last stage, C_wi (Eq. 3), then a classifier.

    Unlike in the paper, which adds such blocks to the stages of the backbone, there is one of them,
    after the last stage; and the last convolution of the block does not start at zero.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        reduction: the bottleneck of the block has Z // reduction channels.
        options: those of :class:`ContextFramework`, and of :class:`PlainHead`,
            :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        reduction: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            context=partial(contexts.GCNet, reduction=reduction),
            **options,
        )
