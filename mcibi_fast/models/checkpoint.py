"""Models out of what a weights file says: created, with its weights or fresh ones."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcibi_fast.models.outline import outline
from mcibi_fast.models.registry import create, head_type, parse
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

OPTIONS: dict[str, float] = {"stages": 100, "pool_scales": 64, "dilations": 1000, "history": 1000}
"""Largest numbers that a file may have for options whose cost is in no weight's shape."""


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
    path: str | Path, *, classes: Sequence[str] | None = None, **changes: Any
) -> tuple[Segmentor, ModelSpec]:
    """Rebuilds a trained model, in evaluation mode on the CPU.

    The file may be anyone's: no model is made that is larger than its weights.

    Args:
        path: whatever `find_weights` takes.
        classes: the data's class names, where there is data to agree with.
        changes: options in place of the stored ones.

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
    changes["pretrained"] = False  # the stored weights would replace them anyway
    check_fits(spec, file, **changes)
    model = create_model(spec, **changes)
    load_weights(model, file)
    return model.eval(), spec


def check_fits(spec: ModelSpec, file: Path, **changes: Any) -> None:
    """Whether a model has the shapes of the weights in a file, before memory is taken for either.

    Args:
        spec: of the model; its options may come from a file and are checked, too.
        file: of the weights.
        changes: options in place of the stored ones.

    Raises:
        ValueError: they differ, or an option is of another type or size than the model takes.
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
    head = head_type(kind.framework, kind.memory, video=kind.history > 0)
    for cls in head.__mro__:
        if init := vars(cls).get("__init__"):
            types = typing.get_type_hints(init) | types
    _check_types(spec.options, types)


def _check_types(options: dict[str, Any], types: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in types and not fits(value, types[name]):
            raise ValueError(f"model.options.{name}: expected {describe(types[name])}")
        most = OPTIONS.get(name)
        for number in value if isinstance(value, list) else [value]:
            if most is not None and isinstance(number, (int, float)) and number > most:
                raise ValueError(
                    f"model.options.{name}: {number} is more than checkpoint.OPTIONS allows a "
                    f"file: {most}"
                )
