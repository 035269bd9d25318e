"""EncNet (arXiv 1803.08904): context encoding as the context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.models.context_framework import ContextFramework
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.within_image import EncNet as Context


@framework("encnet", "EncNet", source="arXiv 1803.08904", context="context encoding")
class EncNet(ContextFramework):
    """An encoding of the whole image that weighs the channels, C_wi (Eq. 3), then a classifier.

    Without a memory a linear layer also predicts from the encoding which classes are in the image;
    ``loss_se`` is its binary cross entropy, the mean over images and classes. With a memory the
    head on C_wi takes its place, as in every framework. As in the released code, the encoding is
    the mean over the codewords of their residuals, which the paper adds.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        num_codes: number of codewords.
        se_weight: weight of ``loss_se``; 0 leaves the layer out. Only without a memory; 0.2 if
            None.
        within_image: a context of your own to use instead; there is then no ``loss_se``.
        feats_channels: Z, channels of the context and of the pixel representations.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.

    Raises:
        TypeError: ``se_weight`` with a memory, or with a context of your own.
    """

    one_logit = False

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        num_codes: int = 32,
        se_weight: float | None = None,
        within_image: nn.Module | None = None,
        feats_channels: int = 512,
        **options: Any,
    ) -> None:
        predicts = not self.has_memory and within_image is None
        if se_weight is not None and not predicts:
            raise TypeError("se_weight: only EncNet without a memory, with its own context, has it")
        super().__init__(
            num_classes,
            in_channels,
            context=partial(Context, num_codes=num_codes),
            within_image=within_image,
            feats_channels=feats_channels,
            **options,
        )
        self.se_weight = 0.2 if se_weight is None else se_weight
        self.presence = None
        if predicts and self.se_weight:
            self.presence = nn.Linear(feats_channels, num_classes)

    def predict(self, maps: Tensor, further: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PlainHead.predict`; the further prediction is that of the classes present."""
        if self.presence is None or not further:
            plain: Any = super()
            return plain.predict(maps, further)
        decoder: Any = self.decoder
        within, encoding = decoder.conv.encode(maps)
        return decoder.classify(within), {"loss_se": self.presence(encoding)}

    def further_losses(self, further: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """``loss_se``, whose target is 1 for the classes of which the image has a pixel."""
        return {
            name: self.se_weight
            * F.binary_cross_entropy_with_logits(
                logits, present_classes(labels, self.num_classes).to(logits.dtype)
            )
            for name, logits in further.items()
        }


def present_classes(labels: Tensor, num_classes: int) -> Tensor:
    """Whether each image has a pixel of each class: (B, H, W) -> (B, K) bool.

    Labels outside 0..K-1 are no class.
    """
    flat = labels.long().flatten(1)
    known = (flat >= 0) & (flat < num_classes)
    # One column more takes the labels that are no class; scatter does not wait for the device.
    found = torch.zeros(len(flat), num_classes + 1, dtype=torch.bool, device=labels.device)
    return found.scatter(1, flat.where(known, num_classes), True)[:, :num_classes]
