"""Models out of what a weights file says: created, with its weights or fresh ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcibi_fast.models.registry import create
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.models.weights import ModelSpec, find_weights, load_weights, read_spec


def create_model(spec: ModelSpec, **changes: Any) -> Segmentor:
    """The model with fresh weights (or pretrained ones, where its options say so).

    Args:
        spec: of the model.
        changes: options in place of the stored ones.

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
        path: whatever `find_weights` takes.
        classes: the data's class names, where there is data to agree with.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: not ours, its weights do not fit its model, or another number of classes.
    """
    file = find_weights(path)
    spec = read_spec(file)
    if classes is not None and len(classes) != len(spec.classes):
        raise ValueError(
            f"checkpoint: {file} has {len(spec.classes)} classes, the data has {len(classes)}"
        )
    model = create_model(spec, pretrained=False)  # the stored weights would replace them anyway
    load_weights(model, file)
    return model.eval(), spec
