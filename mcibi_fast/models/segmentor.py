"""A model: a backbone and a head."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mcibi_fast.models.checkpointing import set_checkpointing
from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.models.weights import Precision
from mcibi_fast.nn.class_memory import ClassMemory
from mcibi_fast.nn.fold import fold_batch_norms
from mcibi_fast.ops.scripting import refuse_scripting


class Segmentor(nn.Module):
    """Computes logits from images: ``head(backbone(images))``.

    Args:
        backbone: images (B, 3, H, W) -> list of feature maps, finest first.
        head: feature maps -> :class:`SegmentationOutput`.

    Attributes:
        normalisation: mean and standard deviation (three each, of colours in 0..1) by which the
            images must be normalised, if the weights say so: pretrained ones, and checkpoints.
            Evaluations normalise by it, whatever the dataset's own numbers are.
        precision: mixed precision of the training: "no", "bf16" or "fp16". Evaluation and
            prediction use it unless told otherwise; a call of the model itself does not.
    """

    precision: Precision = "no"
    head: Any  # a SegmentationHead; mypy would take attributes of subclasses for Tensor | Module
    normalisation: tuple[Sequence[float], Sequence[float]] | None

    def __init__(self, backbone: nn.Module, head: SegmentationHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.normalisation = None

    def forward(
        self, images: Tensor, labels: Tensor | None = None, **options: Any
    ) -> SegmentationOutput:
        """Computes logits; labels add the losses and, in training mode, the update of the memory.

        Args:
            images: (B, 3, H, W), normalised as the backbone expects.
            labels: (B, H, W), any integer dtype. In evaluation of a model that ``needs_labels``
                they may have another size than the images, if the images were resized.
            options: options for the head; heads with a memory take ``stages`` (iterative
                inference).

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

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Training keeps fewer activations and computes them again in the backward pass.

        Gradients, memory, noise and batch norms' statistics are those of training without it. The
        backbone takes part if it has timm's ``set_grad_checkpointing``; else there is a warning.

        Args:
            gradient_checkpointing_kwargs: as in transformers; ``{"use_reentrant": False}`` is what
                is done anyway.

        Raises:
            ValueError: other settings of ``torch.utils.checkpoint``.
        """
        settings = dict(gradient_checkpointing_kwargs or {})
        if settings.pop("use_reentrant", False) or settings:
            raise ValueError(
                "gradient_checkpointing_kwargs: only use_reentrant=False, the default, is possible "
                f"here, got {dict(gradient_checkpointing_kwargs or {})}"
            )
        set_checkpointing(self.backbone, self.head, True)

    def gradient_checkpointing_disable(self) -> None:
        """Training keeps all activations again."""
        set_checkpointing(self.backbone, self.head, False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """The same under timm's name."""
        set_checkpointing(self.backbone, self.head, enable)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are computed again."""
        return self.head.gradient_checkpointing

    def schedule(self, *, epoch: int, lr_factor: float) -> None:
        """Prepares the next training step: the memory's momentum, losses that begin later.

        Call it before every training step if an option depends on the schedule. It does nothing on
        a device, and nothing at all for a model without a memory.

        Args:
            epoch: the step's epoch, counted from 0.
            lr_factor: the step's learning rate divided by the initial one.
        """
        self.head.schedule(epoch=epoch, lr_factor=lr_factor)

    @property
    def needs_labels(self) -> bool:
        """Whether evaluation needs labels, as when they are the weights W (GT-MCIBI++, Table 1)."""
        return self.head.needs_labels

    def pixel_representations(self, images: Tensor) -> Tensor:
        """R (Eq. 1): (B, 3, H, W) -> (B, Z, h, w)."""
        return self.head.pixel_representations(self.backbone(images))

    def fold(self) -> Segmentor:
        """A copy for inference, in evaluation mode; the logits are equal up to rounding.

        Batch norms are folded into their convolutions (in the backbone those that a symbolic trace
        finds), and the memory's class representations into the head. The copy supports everything
        except training: ``stages``, losses, saving, ``torch.compile``, ``torch.export``.

        Raises:
            TypeError: the head has no memory.
            ValueError: the memory has several representations per class.
        """
        head = self.head.fold()
        backbone = copy.deepcopy(self.backbone).eval()
        fold_batch_norms(backbone)
        folded = type(self)(backbone.requires_grad_(False), head).eval()
        folded.normalisation = self.normalisation
        folded.precision = self.precision
        return folded

    def train(self, mode: bool = True) -> Segmentor:
        """Switches to training mode, or to evaluation mode.

        Raises:
            RuntimeError: training mode for a folded model.
        """
        self.head.train(mode)  # first: if a folded head refuses, nothing has been changed yet
        return super().train(mode)

    @property
    def memory(self) -> ClassMemory:
        """The head's memory; a model without a memory, or a folded one, lacks this attribute."""
        return self.head.memory


class SegmentorWrapper(nn.Module):
    """Base of wrappers that are called as a model in evaluation, with the wrapped model's head.

    Args:
        model: the wrapped model.
    """

    def __init__(self, model: Segmentor) -> None:
        super().__init__()
        self.model = model

    @property
    def head(self) -> SegmentationHead:
        """The wrapped model's head, which does the final upsampling."""
        return self.model.head

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """How the wrapped model's images are normalised."""
        return self.model.normalisation

    @property
    def precision(self) -> Precision:
        """The wrapped model's precision."""
        return self.model.precision

    @property
    def needs_labels(self) -> bool:
        """Whether the wrapped model must be called with labels."""
        return self.model.needs_labels


refuse_scripting(Segmentor, SegmentorWrapper)
