"""ISANet (arXiv 1907.12273): interlaced sparse attention as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mcibi_fast.models.context_framework import ContextFramework
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.within_image import ISANet as Context


@framework("isanet", "ISANet", source="arXiv 1907.12273", context="interlaced sparse attention")
class ISANet(ContextFramework):
    """Interlaced sparse self-attention, C_wi (Eq. 3), then a classifier.

    As in the released code, zeros that pad the map to whole blocks take part in the attentions.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        context_channels: channels of queries and keys.
        block_size: height and width of a block.
        options: those of :class:`ContextFramework`, and of :class:`PlainHead`,
            :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        context_channels: int = 256,
        block_size: tuple[int, int] = (8, 8),
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            context=partial(Context, transform_channels=context_channels, block_size=block_size),
            **options,
        )
