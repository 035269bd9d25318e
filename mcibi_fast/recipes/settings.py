"""``--set field=value``: sets any field of a nested dataclass after checking the value's type."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable
from typing import Any

from mcibi_fast.typed import describe, fits, options


def apply_settings(config: Any, settings: Iterable[str]) -> None:
    """Applies strings ``field=value`` to a dataclass in place.

    Names of nested fields contain dots (``optimizer.lr=0.02``). A dict field takes any key after
    its name (``model.options.feats_channels=64``), a property with a setter takes the value as
    text. Values are read as JSON if they are JSON, otherwise as text, and must fit the field's
    type.

    Args:
        config: dataclass instance, whose fields may be dataclasses themselves.
        settings: strings ``name=value``.

    Raises:
        ValueError: no ``=``, an unknown field (the message names the nearest one), or a value of
            the wrong type.
    """
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting}: expected FIELD=VALUE")
        _set(config, name.strip(), text.strip())


def field_names(config: Any) -> list[str]:
    """The names of all fields, nested ones with dots; dict fields end in ``.*``."""
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            names += [f"{field.name}.{inner}" for inner in field_names(value)]
        else:
            names.append(f"{field.name}.*" if isinstance(value, dict) else field.name)
    return names


def _set(config: Any, name: str, text: str) -> None:
    *parents, last = name.split(".")
    holder = target = config
    for i, part in enumerate(parents):
        holder, target = target, getattr(target, part, None) if _has_field(target, part) else None
        if isinstance(target, dict) and i == len(parents) - 1:
            target[last] = _parse(text)
            return
        if not dataclasses.is_dataclass(target):
            raise ValueError(_unknown(config, name))
    alias = getattr(type(target), last, None)
    if isinstance(alias, property) and alias.fset is not None:
        setattr(target, last, text)  # a property such as model.name, which sets several fields
        return
    if not _has_field(target, last) or dataclasses.is_dataclass(getattr(target, last)):
        raise ValueError(_unknown(config, name))
    annotation = typing.get_type_hints(type(target))[last]
    value = _coerce(name, text, annotation)
    if type(target).__dataclass_params__.frozen:
        setattr(holder, parents[-1], dataclasses.replace(target, **{last: value}))
    else:
        setattr(target, last, value)


def _has_field(target: Any, name: str) -> bool:
    return dataclasses.is_dataclass(target) and name in {
        field.name for field in dataclasses.fields(target)
    }


def _unknown(config: Any, name: str) -> str:
    names = field_names(config)
    # "lr" probably means optimizer.lr, so the last part of each name is compared as well.
    by_last = {full.removesuffix(".*").rsplit(".", 1)[-1]: full for full in names}
    near = difflib.get_close_matches(name, names, 1, cutoff=0.75) or [
        by_last[last]
        for last in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, 1, cutoff=0.5)
    ]
    hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(names)}"
    return f"--set {name}: no such field; {hint}"


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"None": None, "True": True, "False": False}.get(text, text)


def _coerce(name: str, text: str, annotation: Any) -> Any:
    value = text if annotation is str else _parse(text)
    if not fits(value, annotation):
        raise ValueError(f"--set {name}={text}: expected {describe(annotation)}")
    wants_tuple = any(typing.get_origin(option) is tuple for option in options(annotation))
    return tuple(value) if wants_tuple and isinstance(value, list) else _widen(value, annotation)


def _widen(value: Any, annotation: Any) -> Any:
    """The value; an integer for a float field becomes a float."""
    wants_float = float in options(annotation) and int not in options(annotation)
    return float(value) if wants_float and type(value) is int else value
