"""Creates the model that a weights file describes, with the file's weights or fresh ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcibi_fast.models.registry import create
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.models.weights import ModelSpec, find_weights, load_weights, read_spec


def create_model(spec: ModelSpec, **changes: Any) -> Segmentor:
    """The model with fresh weights (or pretrained ones, if its options say so).

    Args:
        spec: the model's specification.
        changes: options that replace the stored ones.

    Raises:
        ValueError: no such framework, backbone or option.
    """
    options = {"ignore_index": spec.ignore_index} | spec.options | changes
    try:
        return create(spec.name, len(spec.classes), backbone=spec.backbone, **options)
    except TypeError as error:  # an option that the framework does not have
        raise ValueError(f"model.options: {error}") from error


def load_model(
    path: str | Path, *, classes: Sequence[str] | None = None
) -> tuple[Segmentor, ModelSpec]:
    """Rebuilds a trained model, in evaluation mode on the CPU.

    Args:
        path: a weights file, or a directory as `find_weights` takes it.
        classes: class names of the data that the model will be used with, if any.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is not a checkpoint of this package, its weights do not fit its model,
            or its number of classes differs from that of ``classes``.
    """
    file = find_weights(path)
    spec = read_spec(file)
    if classes is not None and len(classes) != len(spec.classes):
        raise ValueError(
            f"checkpoint: {file} has {len(spec.classes)} classes, the data has {len(classes)}"
        )
    model = create_model(spec, pretrained=False)  # the stored weights replace pretrained ones
    load_weights(model, file)
    return model.eval(), spec
