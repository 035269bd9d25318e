"""PSANet (ECCV 2018): point-wise spatial attention as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mcibi_fast.models.context_framework import ContextFramework
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.within_image import PSANet as Context


@framework("psanet", "PSANet", source="ECCV 2018", context="point-wise spatial attention")
class PSANet(ContextFramework):
    """Point-wise spatial attention in both directions, C_wi (Eq. 3), then a classifier.

    As in the released code, the 1x1 convolution after the attentions has a padding of 1, so that
    resizing its result shifts it a little; and offsets that the attention's window does not reach
    count in its softmax, with a logit of 0.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        mask_size: height and width of the attention's window of offsets; odd.
        shrink_factor: the attention runs on a map that is smaller by this factor.
        options: those of :class:`ContextFramework`, and of :class:`PlainHead`,
            :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        mask_size: tuple[int, int] = (97, 97),
        shrink_factor: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            context=partial(Context, mask_size=mask_size, shrink_factor=shrink_factor),
            **options,
        )
