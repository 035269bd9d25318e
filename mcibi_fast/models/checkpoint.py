"""Creates the model that a weights file describes, with the file's weights or fresh ones."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcibi_fast.limits import check_field
from mcibi_fast.models.creation import create
from mcibi_fast.models.outline import outline
from mcibi_fast.models.registry import head_type, parse
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.models.weights import (
    ModelSpec,
    check_shapes,
    find_weights,
    load_weights,
    read_shapes,
    read_spec,
)
from mcibi_fast.typed import describe, fits


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
        model = create(spec.name, len(spec.classes), backbone=spec.backbone, **options)
    except TypeError as error:  # an option that the framework does not have
        raise ValueError(f"model.options: {error}") from error
    model.normalisation = spec.mean, spec.std
    lasting = {k: v for k, v in changes.items() if k not in ("pretrained", "loss")}
    model.spec = replace(spec, options=spec.options | lasting)
    return model


def load_model(
    path: str | Path, *, classes: Sequence[str] | None = None, **changes: Any
) -> tuple[Segmentor, ModelSpec]:
    """Rebuilds a trained model, in evaluation mode on the CPU.

    Its weights are in full precision. If it was trained in mixed precision, evaluation and
    prediction compute in it as well (``model.precision``).

    The file need not be trusted: no model is built that is larger than its weights.

    Args:
        path: a weights file, or a directory as `find_weights` takes it.
        classes: class names of the data that the model will be used with, if any.
        changes: options that replace the stored ones.

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
    changes["pretrained"] = False  # the stored weights replace pretrained ones
    check_fits(spec, file, **changes)
    model = create_model(spec, **changes)
    load_weights(model, file)
    model.precision = spec.mixed_precision
    return model.eval(), spec


def check_fits(spec: ModelSpec, file: Path, **changes: Any) -> None:
    """Checks that a model has the shapes of the weights in a file, before allocating either.

    Args:
        spec: the model's specification; its options may come from a file and are checked, too.
        file: the weights file.
        changes: options that replace the stored ones.

    Raises:
        ValueError: the shapes differ, or an option has a type or size that is not allowed.
    """
    _check_options(spec)
    shapes = read_shapes(file)
    try:
        model = outline(lambda: create_model(spec, **changes), len(shapes))
    except ValueError as error:
        raise ValueError(f"checkpoint: {file}: {str(error).splitlines()[0]}") from error
    check_shapes(model, shapes, file)


def _check_options(spec: ModelSpec) -> None:
    types = typing.get_type_hints(create)
    _check_types(spec.options, types)
    kind = parse(spec.name, spec.options.get("memory"), spec.options.get("history"))
    head = head_type(kind.framework, kind.memory, video=kind.history > 0, method=kind.method)
    for cls in head.__mro__:
        if init := vars(cls).get("__init__"):
            types = typing.get_type_hints(init) | types
    _check_types(spec.options, types)


def _check_types(options: dict[str, Any], types: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in types and not fits(value, types[name]):
            raise ValueError(f"model.options.{name}: expected {describe(types[name])}")
        check_field(f"model.options.{name}", value)
