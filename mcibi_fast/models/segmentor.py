"""A model: a backbone and a head."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mcibi_fast.models.checkpointing import set_checkpointing
from mcibi_fast.models.fine_tuning import Beginning
from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.output import DictOutput, SegmentationOutput
from mcibi_fast.models.weights import ModelSpec, Precision
from mcibi_fast.nn.class_memory import ClassMemory
from mcibi_fast.nn.fold import fold_batch_norms
from mcibi_fast.nn.transient import transient_tensors
from mcibi_fast.ops.scripting import refuse_scripting

_TRANSIENT = "transient:"


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
        spec: the specification that the model was built from, with its classes and colours; None
            for a model of :func:`mcibi_fast.models.create`.
        beginning: what it took over from a checkpoint, if ``pretrained`` named one of this package.
        tested_with: how the authors tested a released checkpoint, see
            :class:`mcibi_fast.models.weights.ModelSpec`; None for any other model.
    """

    accepts_loss_kwargs = False  # transformers' Trainer shall average over accumulated passes
    precision: Precision = "no"
    spec: ModelSpec | None = None
    beginning: Beginning | None = None
    _created: tuple[str, str, dict[str, Any]] | None = None  # name, backbone, options of `create`
    _dict_output: Callable[..., Any] = DictOutput
    _hub: Any  # mcibi_fast.models.hub, which sets it: it creates models, so it is above this file
    head: Any  # a SegmentationHead; mypy would take attributes of subclasses for Tensor | Module
    normalisation: tuple[Sequence[float], Sequence[float]] | None
    tested_with: dict[str, Any] | None = None

    def __init__(self, backbone: nn.Module, head: SegmentationHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.normalisation = None

    def forward(
        self,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Computes logits; labels add the losses and, in training mode, the update of the memory.

        The memory is updated once per step of the optimiser, also if accelerate or transformers'
        Trainer accumulates the gradients of several calls: with the last of them, from all.

        Args:
            images: (B, 3, H, W), normalised as the backbone expects.
            labels: (B, H, W), any integer dtype. In evaluation of a model that ``needs_labels``
                they may have another size than the images, if the images were resized.
            pixel_values: the images under the name that transformers gives them. The result is then
                what transformers expects, and labels may have any size: logits are upsampled to it.
            options: options for the head; heads with a memory take ``stages`` (iterative
                inference).

        Returns:
            :class:`SegmentationOutput`; for ``pixel_values`` :class:`DictOutput`, whose ``loss`` is
            the sum of all losses.

        Raises:
            ValueError: images or labels of another shape, or no images.
        """
        if (images is None) == (pixel_values is None):
            raise ValueError(
                "images: give them either as the first argument or as pixel_values="
                f"{', not both' * (images is not None)}"
            )
        if images is not None:
            return self._segment(images, labels, **options)
        assert pixel_values is not None
        if self.training and labels is None and self.head.has_memory:
            warnings.warn(
                "labels: none in training mode, so the memory learns nothing and its losses are "
                "missing; the Trainer's compute_loss_func keeps labels from the model",
                stacklevel=2,
            )
        output = self._segment(pixel_values, labels, any_size=True, **options)
        entries = {"loss": output.loss, "logits": output.logits}
        return self._dict_output(**{k: v for k, v in entries.items() if v is not None})

    def _segment(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        any_size: bool = False,
        **options: Any,
    ) -> SegmentationOutput:
        """The forward pass; labels may differ from the images in size if ``any_size``."""
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                f"images: expected floating point (B, 3, H, W), got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        any_size = any_size or (self.needs_labels and not self.training)
        size = labels.shape[1:] if labels is not None and any_size else images.shape[2:]
        if labels is not None and (labels.ndim != 3 or labels.shape != (len(images), *size)):
            raise ValueError(
                f"labels: expected {(len(images), *images.shape[2:])} to go with the images, "
                f"got {tuple(labels.shape)}"
            )
        if self.head.takes_size:
            options["size"] = images.shape[2:]
        return self.head(self.backbone(images), labels, **options)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; for checkpoints of transformers' Trainer there is more in it.

        The Trainer writes it by safetensors, which refuses the channels_last of convolutions, so it
        gets contiguous copies. They come with the tensors that only training needs, among them the
        state of the memory's noise, so that a resumed training continues as if never interrupted.
        """
        state = super().state_dict(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__") != "transformers.trainer":
            return state
        further = {_TRANSIENT + name: t for name, t in transient_tensors(self).items()}
        return {name: tensor.contiguous() for name, tensor in (state | further).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of any module; also takes what ``state_dict`` adds for transformers' Trainer."""
        weights = {k: v for k, v in state_dict.items() if not k.startswith(_TRANSIENT)}
        result = super().load_state_dict(weights, *args, **kwargs)
        for name, tensor in transient_tensors(self).items():
            if (stored := state_dict.get(_TRANSIENT + name)) is not None:
                tensor.copy_(stored)
        return result

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        classes: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
    ) -> Path:
        """Writes the model into a folder for ``from_pretrained``, `mcibi_fast.load` and
        transformers, see :func:`mcibi_fast.models.hub.save_pretrained`.

        Args:
            folder: created if needed.
            classes: K class names; by default those that the model was loaded or trained with, or
                else "class 0", "class 1", ...
            palette: K colours (r, g, b).

        Returns:
            The folder.

        Raises:
            ValueError: a wrong number of classes or colours; an option of the model cannot be
                written; a folded model; a weight that is not finite.
            OSError: the folder cannot be written.
        """
        spec = self._hub.spec_of(self, classes, palette)
        return self._hub.save_pretrained(self, spec, folder)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | os.PathLike[str],
        revision: str | None = None,
        *,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Segmentor:
        """A saved model in evaluation mode on the CPU; ``model.spec`` has its classes and colours.

        Arguments and errors as in :func:`mcibi_fast.models.hub.from_pretrained`.
        """
        model, _ = cls._hub.from_pretrained(
            repo_or_folder, revision, token=token, cache_dir=cache_dir
        )
        return model

    def push_to_hub(
        self,
        repo: str,
        *,
        classes: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Uploads the model to the Hub's repository "owner/name" and returns the commit's address.

        ``classes`` and ``palette`` as in ``save_pretrained``; the rest, and the errors, as in
        :func:`mcibi_fast.models.hub.push_to_hub`.
        """
        spec = self._hub.spec_of(self, classes, palette)
        return self._hub.push_to_hub(
            self, spec, repo, private=private, token=token, commit_message=commit_message
        )

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

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        *,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The same under the name in newer versions of transformers.

        Raises:
            ValueError: also for ``every_n_layers`` and ``offload``, which are not possible here.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                "activation_checkpointing: every_n_layers and offload are not possible here; "
                f"leave them out (got {every_n_layers} and {offload})"
            )
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Training keeps all activations again."""
        self.gradient_checkpointing_disable()

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
        folded.spec, folded._created = self.spec, self._created
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
        model: the wrapped model, whose mode (training or evaluation) the wrapper has.
    """

    def __init__(self, model: Segmentor) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

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
