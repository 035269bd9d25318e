"""DANet (arXiv 1809.02983): attention over positions and over channels as the context."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from mcibi_fast.models.context_framework import ContextFramework
from mcibi_fast.models.registry import framework
from mcibi_fast.nn import within_image as contexts
from mcibi_fast.nn.decoder import Decoder


@framework("danet", "DANet", source="arXiv 1809.02983", context="position and channel attention")
class DANet(ContextFramework):
    """The sum of two branches on the last stage, C_wi (Eq. 3), then a classifier.

    In training two further classifiers, on one branch each, give ``loss_pam`` (position attention)
    and ``loss_cam`` (channel attention), each with weight 1. With a memory there are none: there
    the context has a classifier of its own (MCIBI++) or none (MCIBI).

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        context_channels: channels of the queries and keys of the position attention.
        within_image: a context of your own to use instead; the further classifiers are then left
            out.
        feats_channels: Z, channels of the context and of the pixel representations.
        dropout: channel dropout before each classifier.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.
    """

    position_decoder: Decoder
    channel_decoder: Decoder

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        context_channels: int = 64,
        within_image: nn.Module | None = None,
        feats_channels: int = 512,
        dropout: float = 0.1,
        **options: Any,
    ) -> None:
        Z = feats_channels
        super().__init__(
            num_classes,
            in_channels,
            context=partial(contexts.DANet, transform_channels=context_channels),
            within_image=within_image,
            feats_channels=Z,
            dropout=dropout,
            **options,
        )
        if self.has_memory or within_image is not None:
            return
        self.position_decoder, self.channel_decoder = (
            Decoder(Z, Z, num_classes, dropout=dropout, conv=nn.Identity()) for _ in range(2)
        )

    def predict(self, maps: Tensor, further: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PlainHead.predict`."""
        if not further or not hasattr(self, "position_decoder"):
            plain: Any = super()
            return plain.predict(maps, further)
        decoder: Any = self.decoder
        position, channel = decoder.conv.branches(maps)
        return decoder.classify(position + channel), {
            "loss_pam": self.position_decoder(position),
            "loss_cam": self.channel_decoder(channel),
        }
