"""The base class of heads: what the package expects of a head, and what a framework defines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.models.checkpointing import Checkpointed
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.nn.context import resize
from mcibi_fast.nn.one_logit import two_logits


class SegmentationHead(Checkpointed):
    """The base of every head: computes logits, losses and class maps from feature maps.

    A head's class combines up to three classes (:func:`mcibi_fast.models.head_type`):

    * A **framework**, one subclass in one file, defines what is gathered within the image
      (``gather_within_image``) and what of it is classified (``expand``).
    * :class:`PlainHead`, or with a memory :class:`MCIBIHead` or :class:`MCIBIPPHead`, has the
      forward pass that calls them.
    * :class:`VideoHead` adds past frames to a head with a memory.

    Attributes:
        num_classes: K; 1 for one logit, which tells class 1 from class 0 by its sigmoid.
        one_logit: whether K may be 1; cleared by a framework that uses K in other ways than to
            classify.
        align_corners: whether every bilinear resizing aligns corners, including that of the logits
            to the labels' size.
        ignore_index: label that does not count in the losses.
        has_memory: whether the head gathers from a memory; if so, it has ``context``, ``memory``,
            ``stages`` (iterative inference), ``schedule`` and ``fold``.
        concatenates_context: whether the context within the image is concatenated to R_aug before
            the classifier, as in MCIBI++.
        guided: set by a framework whose context needs a first prediction (ISNet).
        guided_by_auxiliary: set by a guided framework if, without a memory, the first prediction is
            that of the auxiliary head (OCRNet).
        takes_strides: set by a framework with the option ``strides``, those of the backbone's maps,
            which :func:`mcibi_fast.models.create` then passes.
        takes_size: set by a framework whose ``forward`` takes the images' ``size``.
        takes_frames: set by a video method whose ``forward`` takes the ``frames`` themselves, a
            :class:`mcibi_fast.models.flow.Frames`.
        history: number of past frames of a video model's clips; 0 for an image model.
        offsets: how many frames before the current one each past frame is that ``forward`` takes,
            the earliest first; empty for an image model.
    """

    has_memory: ClassVar[bool] = False
    concatenates_context: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    guided_by_auxiliary: ClassVar[bool] = False
    takes_strides: ClassVar[bool] = False
    takes_size: ClassVar[bool] = False
    one_logit: ClassVar[bool] = True
    takes_frames: ClassVar[bool] = False
    history: int = 0
    num_classes: int
    align_corners: bool = False
    ignore_index: int = IGNORE_INDEX
    loss: Any  # a PixelLoss: computes the loss of each classifier's logits
    within_image: Any  # A_wi (Eq. 3), or None
    auxiliary: Any  # the head on an earlier stage, an nn.ModuleList of several, or None

    def forward(
        self, features: Sequence[Tensor], labels: Tensor | None = None, **options: Any
    ) -> SegmentationOutput:
        """Classifies the backbone's maps, finest first; labels (B, H, W) add the losses."""
        raise NotImplementedError

    def pixel_representations(self, features: Sequence[Tensor]) -> Tensor:
        """R (Eq. 1): (B, Z, h, w), the features that are augmented and classified."""
        raise NotImplementedError

    # What a framework defines.

    def gather_within_image(
        self, features: Sequence[Tensor], R: Tensor | None, weight_logits: Tensor | None
    ) -> Tensor:
        """C_wi (Eq. 3): (B, Z, h, w). Only a ``guided`` framework may use R and the prediction."""
        return self.within_image(features[-1])

    def expand(self, features: Sequence[Tensor], within: Tensor) -> Tensor:
        """What is classified of the context within the image: the context itself, or a pyramid."""
        return within

    # What is the same in every framework.

    @property
    def offsets(self) -> Sequence[int]:
        return ()

    @property
    def needs_labels(self) -> bool:
        """Whether evaluation needs labels, as when they are the weights W (GT-MCIBI++, Table 1)."""
        return False

    def schedule(self, *, epoch: int, lr_factor: float) -> None:
        """Prepares the next training step; see :meth:`Segmentor.schedule`."""

    def fold(self) -> SegmentationHead:
        """A copy for inference in which everything is folded that can be.

        Raises:
            TypeError: the head has no memory.
        """
        raise TypeError(
            f"fold: {type(self).__name__} has no memory; heads with MCIBI++ or MCIBI can be folded"
        )

    def _auxiliary_logits(self, features: Sequence[Tensor]) -> Tensor | list[Tensor] | None:
        if not isinstance(self.auxiliary, nn.ModuleList):
            return None if self.auxiliary is None else self._run(self.auxiliary, features[-2])
        maps = features[-1 - len(self.auxiliary) : -1]
        return [self._run(head, m) for head, m in zip(self.auxiliary, maps, strict=True)]

    def further_losses(self, further: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The losses of the further classifiers, by their names; each with weight 1."""
        return {
            name: self.loss(
                logits,
                labels,
                ignore_index=self.ignore_index,
                align_corners=self.align_corners,
            )
            for name, logits in further.items()
        }

    def upsample(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """The final upsampling, as in the losses: (B, K, h, w) -> (B, K, *size).

        It allocates the whole result; ``class_map`` and ``confusion`` do not need it.
        """
        return resize(logits, torch.Size(size), self.align_corners)

    def class_map(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """The class of each pixel after the final upsampling: (B, K, h, w) -> (B, *size) int64.

        Takes logits or probabilities. If several classes are largest, the first one is taken. Of
        one logit, the class is 1 where it is above 0.
        """
        height, width = size
        return ops.upsample_argmax(
            two_logits(logits), (height, width), align_corners=self.align_corners
        )

    def confusion(
        self, logits: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int = IGNORE_INDEX
    ) -> Tensor:
        """The confusion matrix of ``class_map`` at the labels' size, (K, K) int64.

        Args:
            logits: (B, K, h, w), or probabilities.
            labels: (B, H, W), any integer dtype.
            num_classes: K of the labels; it must equal that of the logits, and be 2 for one logit.
            ignore_index: label that does not count.
        """
        return ops.upsample_confusion(
            two_logits(logits),
            labels,
            num_classes,
            ignore_index=ignore_index,
            align_corners=self.align_corners,
        )


def refuse_region_losses(head: SegmentationHead, framework: str) -> None:
    """Raises ValueError if a framework with losses of its own was given those of regions."""
    if head.loss.has_regions:
        raise ValueError(
            f"loss: {framework} has losses of its own for its prediction, so it takes no "
            "loss.cross_entropy, loss.dice, loss.lovasz or loss.focal"
        )


def made(module: nn.Module | Any) -> nn.Module:
    """The given module, or the one that the given function makes.

    A framework passes its context as a function, because the head decides when to make it, and with
    that from which random numbers it is initialised.
    """
    return module if isinstance(module, nn.Module) else module()
