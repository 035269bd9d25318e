"""Frameworks whose context within the image is a module on the last stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from mcibi_fast.models.head import SegmentationHead


class ContextFramework(SegmentationHead):
    """Gathers a context from the last stage, C_wi (Eq. 3), which a classifier follows.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        context: makes the framework's context from its channels before and after.
        within_image: a context of your own to use instead.
        feats_channels: Z, channels of the context and of the pixel representations.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        context: Callable[[int, int], nn.Module],
        within_image: nn.Module | None = None,
        feats_channels: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            within_image=within_image or partial(context, in_channels[-1], feats_channels),
            feats_channels=feats_channels,
            **options,
        )
