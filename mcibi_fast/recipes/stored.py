"""Rebuilds dataclasses from a file that others may have written, after checking every value."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from mcibi_fast.limits import check_field
from mcibi_fast.typed import describe, fits


def rebuild(cls: Any, values: Any) -> Any:
    """A dataclass from values read from JSON; its tuple fields are tuples again, not lists.

    Raises:
        ValueError: an unknown field, a value of the wrong type, or one above its limit.
        TypeError: a field is missing.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__}: expected its fields, got {type(values).__name__}")
    types = typing.get_type_hints(cls)
    unknown = sorted(map(str, values.keys() - {item.name for item in fields(cls)}))
    if unknown:
        raise ValueError(f"{cls.__name__} has no {unknown[0]!r}")
    return cls(**{k: _value(f"{cls.__name__}.{k}", v, types[k]) for k, v in values.items()})


def _value(name: str, value: Any, annotation: Any) -> Any:
    if is_dataclass(value):
        return value
    if not fits(value, annotation):
        raise ValueError(f"{name}: expected {describe(annotation)}, got {_shown(value)}")
    check_field(name, value)
    options = typing.get_args(annotation) or (annotation,)
    wants_tuple = tuple in (typing.get_origin(option) for option in (annotation, *options))
    return tuple(value) if wants_tuple and isinstance(value, list) else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
