"""DNL (arXiv 2006.06668): disentangled non-local attention as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mcibi_fast.models.context_framework import ContextFramework
from mcibi_fast.models.registry import framework
from mcibi_fast.nn import within_image as contexts


@framework("dnlnet", "DNL", source="arXiv 2006.06668", context="disentangled non-local attention")
class DNLNet(ContextFramework):
    """Disentangled non-local attention over a reduced last stage, C_wi (Eq. 3), then a classifier.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        reduction: the attention has Z // reduction channels.
        temperature: of the softmax of the pairwise term.
        options: those of :class:`ContextFramework`, and of :class:`PlainHead`,
            :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        reduction: int = 2,
        temperature: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            context=partial(contexts.DNL, reduction=reduction, temperature=temperature),
            **options,
        )
