"""Frameworks that decode all stages: how a memory joins what they classify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.context import resize
from mcibi_fast.nn.decoder import Decoder


class LateMemory(SegmentationHead):
    """A framework without a context within the image, which classifies a map made of all stages.

    Such a framework defines ``decode`` and calls ``_add_classifier``. No paper combines it with a
    memory. The choice made here: R_aug is resized to the decoded map and concatenated to it, as in
    UperNet's ``memory_joins="after"``; Conv3x3-BN-ReLU to Z channels and the classifier follow.
    """

    context_fuse: Any

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """The map that is classified."""
        raise NotImplementedError

    def _add_classifier(self, width: int, Z: int, dropout: float) -> None:
        """The classifier on the decoded map, which has so many channels, and on R_aug."""
        K = self.num_classes
        if not self.has_memory:
            self.decoder: Any = Decoder(width, width, K, dropout=dropout, conv=nn.Identity())
        elif self.concatenates_context:
            self.decoder = Decoder(width + Z, Z, K, kernel_size=3, dropout=dropout)
        else:
            self.context_fuse = conv_bn_relu(width + Z, Z, 3)

    def decoder_input(self, features: Sequence[Tensor]) -> tuple[Any, Tensor | None]:
        """See :meth:`PlainHead.decoder_input`."""
        return self.decode(features), None

    def prepare_classifier(self, features: Sequence[Tensor], within: Tensor | None) -> Any:
        """See :meth:`MemoryHead.prepare_classifier`."""
        return self.prepare_decoded(self.decode(features))

    def prepare_decoded(self, decoded: Tensor) -> Tensor:
        """What the decoded map contributes to the classifier."""
        block = self.decoder if self.concatenates_context else self.context_fuse
        prepared: Tensor = block.prepare(decoded, first=True)
        return prepared

    def classify(self, augmented: Tensor, prepared: Any) -> Tensor:
        """See :meth:`MemoryHead.classify`."""
        augmented = resize(augmented, prepared.shape[2:], self.align_corners)
        if self.concatenates_context:
            return self.decoder(augmented, prepared, first=True)
        return self.decoder(self.context_fuse.join(prepared, augmented, first=True))


def refuse_within_image(head: SegmentationHead, options: dict[str, Any]) -> None:
    """Raises TypeError for a context within the image, which the framework has no place for."""
    if options.get("within_image") is not None:
        raise TypeError(f"within_image: {type(head).__name__} has no context within the image")


def auxiliary_default(head: SegmentationHead, weight: float | None) -> float:
    """The weight of the auxiliary head's loss in a framework that is released without that head."""
    if weight is not None:
        return weight
    return 0.4 if head.has_memory else 0.0
