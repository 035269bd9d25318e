"""What the rest of the package asks of a head, and what a framework answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.nn.context import resize


class SegmentationHead(nn.Module):
    """Feature maps to logits, losses and class maps: the base of every head.

    A head is put together of up to three classes (:func:`mcibi_fast.models.head_type`):

    * A **framework**, one subclass in one file, says what is gathered within the image
      (``gather_within_image``) and what of it is classified (``expand``).
    * :class:`PlainHead`, or for a memory :class:`MCIBIHead` or :class:`MCIBIPPHead`, has the
      forward pass that calls them.
    * :class:`VideoHead` adds past frames to a memory.

    Attributes:
        num_classes: K.
        align_corners: of every bilinear resizing, that of the logits to the labels included.
        ignore_index: label that does not count in the losses.
        has_memory: whether it gathers from a memory: it then has ``memory``, ``stages`` (iterative
            inference), ``schedule`` and ``fold``, and its ``context`` is not None.
        concatenates_context: whether the context within the image is concatenated to R_aug before
            the classifier, as in MCIBI++.
        guided: of a framework: whether its context needs a first prediction (ISNet).
        history: past frames of a video model, 0 of an image model.
    """

    has_memory: ClassVar[bool] = False
    concatenates_context: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    history: int = 0
    num_classes: int
    align_corners: bool = False
    ignore_index: int = 255
    within_image: Any  # A_wi (Eq. 3), or None

    def forward(
        self, features: Sequence[Tensor], labels: Tensor | None = None, **options: Any
    ) -> SegmentationOutput:
        """Classifies the backbone's maps, finest first; with labels (B, H, W) also the losses."""
        raise NotImplementedError

    def pixel_representations(self, features: Sequence[Tensor]) -> Tensor:
        """R (Eq. 1): (B, Z, h, w), what is augmented and classified."""
        raise NotImplementedError

    # What a framework says.

    def gather_within_image(
        self, features: Sequence[Tensor], R: Tensor | None, weight_logits: Tensor | None
    ) -> Tensor:
        """C_wi (Eq. 3): (B, Z, h, w). Only a ``guided`` framework may use R and the prediction."""
        return self.within_image(features[-1])

    def expand(self, features: Sequence[Tensor], within: Tensor) -> Tensor:
        """What is classified of the context within the image: the context itself, or a pyramid."""
        return within

    # What is the same for all.

    @property
    def needs_labels(self) -> bool:
        """Whether evaluation needs labels: the ground truth gathers (GT-MCIBI++, Table 1)."""
        return False

    def schedule(self, *, epoch: int, lr_factor: float) -> None:
        """Prepares the next training step; see :meth:`Segmentor.schedule`."""

    def fold(self) -> SegmentationHead:
        """A copy for inference with everything folded that can be; of a head with a memory.

        Raises:
            TypeError: it has none.
        """
        raise TypeError(
            f"fold: {type(self).__name__} has no memory; heads with MCIBI++ or MCIBI can be folded"
        )

    def upsample(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """The final upsampling, as the losses do it: (B, K, h, w) -> (B, K, *size).

        It allocates all of that; ``class_map`` and ``confusion`` do not.
        """
        return resize(logits, torch.Size(size), self.align_corners)

    def class_map(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """The class of each pixel after the final upsampling: (B, K, h, w) -> (B, *size) int64.

        Probabilities do as well as logits. The first class on ties.
        """
        height, width = size
        return ops.upsample_argmax(logits, (height, width), align_corners=self.align_corners)

    def confusion(
        self, logits: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int = 255
    ) -> Tensor:
        """The confusion matrix of ``class_map`` at the labels' size, (K, K) int64.

        Args:
            logits: (B, K, h, w), or probabilities.
            labels: (B, H, W), any integer dtype.
            num_classes: K of the labels, which must be that of the logits.
            ignore_index: label that does not count.
        """
        return ops.upsample_confusion(
            logits,
            labels,
            num_classes,
            ignore_index=ignore_index,
            align_corners=self.align_corners,
        )


def made(module: nn.Module | Any) -> nn.Module:
    """A module that was given as it is or as a function that makes it.

    A framework gives its context as a function: which head it stands in decides when it is made,
    and thus which random numbers it starts from.
    """
    return module if isinstance(module, nn.Module) else module()
