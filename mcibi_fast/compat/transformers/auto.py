"""Makes transformers' Auto classes know this package's models; importing it is enough.

After ``import mcibi_fast.compat.transformers.auto`` a folder that ``model.save_pretrained`` wrote,
or its copy on the Hub, works with ``AutoConfig``, ``AutoImageProcessor``,
``AutoModelForSemanticSegmentation`` and ``pipeline("image-segmentation", model=folder)``.
"""

from __future__ import annotations

from mcibi_fast.extras import require

require("mcibi_fast.compat.transformers.auto", "transformers")

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    SegformerImageProcessor,
)
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto import modeling_auto

from mcibi_fast import ops
from mcibi_fast.data.base import normalise
from mcibi_fast.defaults import IGNORE_INDEX, IMAGENET_MEAN, IMAGENET_STD
from mcibi_fast.models import Segmentor, hub
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec, Precision

MODEL_TYPE = "mcibi_fast"


class MCIBIFastConfig(PreTrainedConfig):
    """The specification of a model (:class:`mcibi_fast.models.weights.ModelSpec`) for transformers.

    A model with fresh weights::

        config = MCIBIFastConfig(name="upernet_mcibipp", backbone="resnet50", classes=["a", "b"])
        model = AutoModelForSemanticSegmentation.from_config(config)
    """

    model_type = MODEL_TYPE
    name: str = "fcn_mcibipp"
    backbone: str = "resnet50"
    options: dict[str, Any] | None = None
    classes: list[str] | None = None
    palette: list[list[int]] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    ignore_index: int = IGNORE_INDEX
    mixed_precision: Precision = "no"
    inference: dict[str, Any] | None = None
    id2label: Any = None  # class names by number

    def __post_init__(self, **kwargs: Any) -> None:
        if self.classes is not None and self.id2label is None:
            self.id2label = dict(enumerate(self.classes))
            self.label2id = {name: k for k, name in enumerate(self.classes)}
        super().__post_init__(**kwargs)

    @property
    def spec(self) -> ModelSpec:
        """The specification; its class names are those of ``id2label``."""
        given = {field.name: getattr(self, field.name) for field in fields(ModelSpec)}
        classes = [self.id2label[k] for k in range(len(self.id2label))]
        given |= {"classes": classes, "options": self.options or {}}
        given["palette"] = self.palette or hub.colours(len(classes))
        given["mean"] = self.mean or list(IMAGENET_MEAN)
        given["std"] = self.std or list(IMAGENET_STD)
        return ModelSpec(**given)

    @classmethod
    def of(cls, spec: ModelSpec) -> MCIBIFastConfig:
        """The configuration that says what a specification says."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(spec)})


class MCIBIFastForSemanticSegmentation(Segmentor, PreTrainedModel):  # type: ignore[misc]
    """A :class:`mcibi_fast.models.Segmentor` that is also a model of transformers.

    Weights, names of weights and results are those of the Segmentor. Called with ``pixel_values``
    it returns transformers' ``SemanticSegmenterOutput``.

    Args:
        config: describes the model, which gets fresh weights.
    """

    config_class = MCIBIFastConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _dict_output = SemanticSegmenterOutput

    def __init__(self, config: MCIBIFastConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self._take(create_model(config.spec))

    @classmethod
    def of(cls, model: Segmentor) -> MCIBIFastForSemanticSegmentation:
        """The same model, whose weights are shared, as one of transformers.

        Args:
            model: a model of images with ``spec``, as ``load_model`` returns it.

        Raises:
            ValueError: a video model, or as in :func:`mcibi_fast.models.hub.spec_of`.
        """
        made = cls.__new__(cls)
        PreTrainedModel.__init__(made, MCIBIFastConfig.of(hub.spec_of(model)))
        made._take(model)
        made.training = model.training  # of itself alone; the parts are the model's
        return made

    def _take(self, model: Segmentor) -> None:
        if model.head.history:
            raise ValueError(
                f"{type(self).__name__}: {self.config.name} is a video model, which transformers "
                "has no pipeline for; use mcibi_fast.models.hub.from_pretrained"
            )
        self.backbone, self.head = model.backbone, model.head
        self.normalisation, self.precision = model.normalisation, model.precision
        self.tested_with, self._created = model.tested_with, model._created
        self.spec = model.spec or self.config.spec

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        config: MCIBIFastConfig | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> MCIBIFastForSemanticSegmentation:
        """A saved model in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder, or "owner/name" on the Hub.
            args: not used.
            config: class names other than the saved ones (``id2label``), as many.
            revision, token, cache_dir: see :func:`mcibi_fast.models.hub.from_pretrained`.
            dtype: of the weights, float32 if it is not a ``torch.dtype``.
            device_map: a device, by default the CPU.
            kwargs: further ones of transformers are without effect.

        Raises:
            ValueError: another number of classes than the saved model has, or a ``device_map`` that
                spreads the model over devices; and as in ``hub.from_pretrained``.
        """
        local = Path(pretrained_model_name_or_path).exists()
        model, spec = hub.from_pretrained(
            pretrained_model_name_or_path,
            None if local else revision,
            token=token,
            cache_dir=cache_dir,
        )
        if config is not None:
            if len(config.id2label) != len(spec.classes):
                raise ValueError(
                    f"num_labels: the saved model has {len(spec.classes)} classes, not "
                    f"{len(config.id2label)}; make a new one with from_config, or with "
                    "mcibi_fast.models.create"
                )
            model.spec = replace(spec, classes=config.spec.classes)
        made: Any = cls.of(model)
        made.name_or_path = made.config.name_or_path = str(pretrained_model_name_or_path)
        if isinstance(dtype, torch.dtype):
            made.to(dtype)
        if device_map is not None:
            if not isinstance(device_map, (str, int, torch.device)) or device_map == "auto":
                raise ValueError(
                    f"device_map: expected one device, such as 'cuda', got {device_map!r}"
                )
            made.to(device_map)
        return made

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | os.PathLike[str],
        *,
        classes: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> Path:
        """Writes the folder that :meth:`mcibi_fast.models.Segmentor.save_pretrained` writes.

        Args:
            folder, classes, palette: as there; class names are by default those of the config.
            is_main_process: false in the processes that must not write.
            push_to_hub: refused; use the method of that name.
            kwargs: further ones of transformers, such as ``state_dict``, are without effect.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: use model.push_to_hub('owner/name')")
        if not is_main_process:
            return Path(folder)
        names = classes or self.config.spec.classes
        return super().save_pretrained(folder, classes=names, palette=palette)

    def fold(self) -> Segmentor:
        """See :meth:`mcibi_fast.models.Segmentor.fold`; the copy is a plain Segmentor."""
        plain = Segmentor(self.backbone, self.head)
        plain.normalisation, plain.precision = self.normalisation, self.precision
        plain.spec, plain._created = self.spec, self._created
        return plain.fold()


class MCIBIFastImageProcessor(SegformerImageProcessor):
    """Normalises images as this package does, and makes label maps of logits.

    Images keep their size (``do_resize`` is off unless it is given). The label maps are those of
    ``F.interpolate`` to the wanted size followed by the argmax, without the upsampled logits.

    Args:
        align_corners: whether the model's upsampling aligns corners.
        kwargs: as in ``SegformerImageProcessor``.
    """

    do_resize = False

    def __init__(self, *, align_corners: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.align_corners = align_corners

    def rescale_and_normalize(
        self,
        images: Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
    ) -> Tensor:
        """(image / 255 - mean) / std, in this order of operations, as training computes it."""
        usual = do_rescale and do_normalize and rescale_factor == 1 / 255
        if usual and images.dtype == torch.uint8 and images.shape[-3] == 3:
            return normalise(images, image_mean, image_std)
        return super().rescale_and_normalize(
            images, do_rescale, rescale_factor, do_normalize, image_mean, image_std
        )

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Any]:
        """Label maps of the model's output.

        Args:
            outputs: with ``logits`` (B, K, h, w).
            target_sizes: (height, width) for each image; by default that of the logits.
            return_segmentation_scores: also return the upsampled logits.

        Returns:
            For each image class indices (height, width), int64; with ``return_segmentation_scores``
            transformers' ``SemanticSegmentationPostProcessorOutput`` of both.

        Raises:
            ValueError: there are not as many sizes as images.
        """
        logits = outputs.logits
        if target_sizes is None:
            target_sizes = [logits.shape[2:]] * len(logits)
        if len(target_sizes) != len(logits):
            raise ValueError(
                f"target_sizes: expected {len(logits)}, one for each image, got {len(target_sizes)}"
            )
        sizes = [(int(height), int(width)) for height, width in target_sizes]
        if not return_segmentation_scores:
            return [
                ops.upsample_argmax(one[None], size, align_corners=self.align_corners)[0]
                for one, size in zip(logits, sizes, strict=True)
            ]
        scores = [
            F.interpolate(one[None], size, mode="bilinear", align_corners=self.align_corners)[0]
            for one, size in zip(logits, sizes, strict=True)
        ]
        return [
            SemanticSegmentationPostProcessorOutput(
                data={"segmentation": each.argmax(0), "segmentation_scores": each}
            )
            for each in scores
        ]


AutoConfig.register(MODEL_TYPE, MCIBIFastConfig)
AutoModelForSemanticSegmentation.register(MCIBIFastConfig, MCIBIFastForSemanticSegmentation)
AutoImageProcessor.register(
    MCIBIFastConfig, image_processor_classes={"torchvision": MCIBIFastImageProcessor}
)
# Pipelines look here for the models that they are made for, and would log an error otherwise.
modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[MODEL_TYPE] = (
    MCIBIFastForSemanticSegmentation.__name__
)
