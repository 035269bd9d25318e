"""MCIBI++'s memory in models of segmentation_models.pytorch."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from mcibi_fast.compat.dataset_context import insert, is_a, last_conv, unknown

_OPTIONS = "_mcibi"  # in the saved configuration


def with_mcibi(model: nn.Module, **options: Any) -> nn.Module:
    """Puts a dataset-level context in front of a model's classifier, in place.

    The library leaves the loss to you, so one term is yours to add in training:
    ``loss = criterion(model(images), labels) + model.mcibi_loss(labels)``. With it each step of the
    optimiser updates the memory. In evaluation mode the masks are those of the last stage.
    ``save_pretrained`` saves the options as well, and :func:`from_pretrained` loads the result.

    Args:
        model: a model of segmentation_models_pytorch for two classes or more.
        options: of :class:`mcibi_fast.compat.dataset_context.ContextClassifier`. Here ``pool`` is
            by default what makes the stride of the features 8 (Unet: 8, FPN: 2, DeepLabV3: 1), and
            ``align_corners`` is True, as in the library's upsampling.

    Returns:
        ``model`` itself.

    Raises:
        TypeError, ValueError: the model is not known or has a context already; a wrong option.
    """
    if not isinstance(model, nn.Module) or not is_a(model, "SegmentationModel"):
        raise unknown(model, "segmentation_models_pytorch", "all of its SegmentationModel")
    held: Any = model
    classifier = last_conv(model, "segmentation_head")
    filled = {"pool": max(1, 8 // _stride(model)), "align_corners": True} | options
    held.mcibi_loss = insert(model, classifier, filled).loss
    held.config[_OPTIONS] = options
    return model


def from_pretrained(path: str, **options: Any) -> nn.Module:
    """Loads what ``save_pretrained`` of a model with a memory has saved.

    Args:
        path: a folder, or a name on the Hugging Face Hub.
        options: ``revision``, ``token``, ``cache_dir`` of ``hf_hub_download``.

    Raises:
        ValueError: what was saved has no memory.
    """
    smp = importlib.import_module("segmentation_models_pytorch")
    safetensors = importlib.import_module("safetensors.torch")

    def file(name: str) -> str:
        if Path(path).is_dir():
            return str(Path(path, name))
        return importlib.import_module("huggingface_hub").hf_hub_download(path, name, **options)

    config = json.loads(Path(file("config.json")).read_text())
    if _OPTIONS not in config:
        raise ValueError(
            f"from_pretrained: the configuration of {path} has no memory; load it with "
            "segmentation_models_pytorch and give the model to with_mcibi"
        )
    own, name = config.pop(_OPTIONS), config.pop("_model_class")
    model = getattr(smp, name)(**config | {"encoder_weights": None})
    with_mcibi(model, **own).load_state_dict(safetensors.load_file(file("model.safetensors")))
    return model.eval()


def _stride(model: Any) -> int:
    """The stride of the features that the model classifies."""
    head = model.segmentation_head
    found: Any = [m.scale_factor for m in head.modules() if isinstance(m, nn.Upsample)]
    found += [getattr(head, "upsampling_factor", 1)]  # of DPT
    return int(found[0])
