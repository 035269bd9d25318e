"""A backbone and a head."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.nn.class_memory import ClassMemory
from mcibi_fast.nn.fold import fold_batch_norms


class Segmentor(nn.Module):
    """Images to logits: ``head(backbone(images))``.

    Args:
        backbone: images (B, 3, H, W) -> list of feature maps, finest first.
        head: feature maps -> :class:`SegmentationOutput`.
    """

    head: Any  # a SegmentationHead; nn.Module's own annotation would hide what it has

    def __init__(self, backbone: nn.Module, head: SegmentationHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(
        self, images: Tensor, labels: Tensor | None = None, **options: Any
    ) -> SegmentationOutput:
        """Logits, and with labels the losses; in training mode the memory is then updated.

        Args:
            images: (B, 3, H, W), normalised as the backbone expects.
            labels: (B, H, W), any integer dtype. In evaluation of a model that ``needs_labels``
                they may have another size than the images: the ground truth of resized ones.
            options: for the head; those with a memory take ``stages`` (iterative inference).

        Raises:
            ValueError: images or labels of another shape.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                f"images: expected floating point (B, 3, H, W), got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        resized = self.needs_labels and not self.training
        size = labels.shape[1:] if labels is not None and resized else images.shape[2:]
        if labels is not None and (labels.ndim != 3 or labels.shape != (len(images), *size)):
            raise ValueError(
                f"labels: expected {(len(images), *images.shape[2:])} to go with the images, "
                f"got {tuple(labels.shape)}"
            )
        return self.head(self.backbone(images), labels, **options)

    def schedule(self, *, epoch: int, lr_factor: float) -> None:
        """Prepares the next training step: the memory's momentum, losses that begin later.

        Call it before every training step where an option says that something follows the
        schedule; touches no device. Does nothing for a model without a memory.

        Args:
            epoch: of the step, from 0.
            lr_factor: its learning rate as a share of the initial one.
        """
        self.head.schedule(epoch=epoch, lr_factor=lr_factor)

    @property
    def needs_labels(self) -> bool:
        """Whether evaluation must pass labels: the ground truth gathers (GT-MCIBI++, Table 1)."""
        return self.head.needs_labels

    def pixel_representations(self, images: Tensor) -> Tensor:
        """R (Eq. 1): (B, 3, H, W) -> (B, Z, h, w)."""
        return self.head.pixel_representations(self.backbone(images))

    def fold(self) -> Segmentor:
        """A copy for inference, in evaluation mode; the logits are equal up to rounding.

        Folds the batch norms into their convolutions, in the backbone those that a symbolic trace
        finds, and the memory's class representations into the head. The copy supports everything
        but training: ``stages``, losses, saving, ``torch.compile``, ``torch.export``.

        Raises:
            TypeError: the head has no memory.
            ValueError: the memory has several representations per class.
        """
        head = self.head.fold()
        backbone = copy.deepcopy(self.backbone).eval()
        fold_batch_norms(backbone)
        return type(self)(backbone.requires_grad_(False), head).eval()

    def train(self, mode: bool = True) -> Segmentor:
        """Training mode, or evaluation mode.

        Raises:
            RuntimeError: training mode of a folded model.
        """
        self.head.train(mode)  # first: a folded head refuses, and nothing has changed yet
        return super().train(mode)

    @property
    def memory(self) -> ClassMemory:
        """The head's memory; a model without one, or folded, has no such attribute."""
        return self.head.memory


class SegmentorWrapper(nn.Module):
    """What stands for a model where models are tested: called as one, upsampled as the wrapped one.

    Args:
        model: the wrapped one.
    """

    def __init__(self, model: Segmentor) -> None:
        super().__init__()
        self.model = model

    @property
    def head(self) -> SegmentationHead:
        """The wrapped model's."""
        return self.model.head

    @property
    def needs_labels(self) -> bool:
        """Whether it must be called with labels."""
        return self.model.needs_labels
