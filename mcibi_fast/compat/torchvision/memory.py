"""MCIBI++'s memory in torchvision's segmentation models."""

from __future__ import annotations

from typing import Any

from torch import nn

from mcibi_fast.compat.dataset_context import insert, is_a, last_conv, unknown


def with_mcibi(model: nn.Module, **options: Any) -> nn.Module:
    """Puts a dataset-level context in front of a model's classifier, in place.

    The library leaves the loss to you, so one term is yours to add in training:
    ``loss = criterion(model(images)["out"], labels) + model.mcibi_loss(labels)``. With it each step
    of the optimiser updates the memory. In evaluation mode ``"out"`` is that of the last stage. To
    load a saved ``state_dict``, build the model and call ``with_mcibi`` with the same options.

    Args:
        model: ``fcn_*`` or ``deeplabv3_*`` of torchvision, for two classes or more.
        options: of :class:`mcibi_fast.compat.dataset_context.ContextClassifier`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError, ValueError: the model is not known or has a context already; a wrong option.
    """
    if not isinstance(model, nn.Module) or not any(is_a(model, n) for n in ("FCN", "DeepLabV3")):
        raise unknown(model, "torchvision", "FCN, DeepLabV3")
    held: Any = model
    held.mcibi_loss = insert(model, last_conv(model, "classifier"), options).loss
    return model
