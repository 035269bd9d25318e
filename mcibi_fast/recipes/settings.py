"""``--set field=value``: any field of a nested configuration dataclass, checked and typed."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable
from typing import Any


def apply_settings(config: Any, settings: Iterable[str]) -> None:
    """Applies ``field=value`` texts to a dataclass in place.

    Nested fields are dotted (``optimizer.lr=0.02``); a dict field takes any key after its name
    (``model.options.feats_channels=64``), a property with a setter its text. Values are read as
    JSON where they are JSON, else as text, and must fit the field's type.

    Args:
        config: dataclass instance; nested dataclasses are fields of it.
        settings: texts ``name=value``.

    Raises:
        ValueError: no ``=``, an unknown field (naming the nearest), or a value of the wrong type.
    """
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting}: expected FIELD=VALUE")
        _set(config, name.strip(), text.strip())


def field_names(config: Any) -> list[str]:
    """Every settable name, dotted; dict fields end in ``.*``."""
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
        setattr(target, last, text)  # several fields by one word
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
    # "lr" means optimizer.lr, so the last part is compared as well as the whole.
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
    wants_tuple = any(typing.get_origin(option) is tuple for option in _options(annotation))
    return tuple(value) if wants_tuple and isinstance(value, list) else _widen(value, annotation)


def _options(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value, with lists for tuples, is of an annotated type."""
    for option in _options(annotation):
        origin = typing.get_origin(option)
        if origin is typing.Literal:
            if any(value == each and type(value) is type(each) for each in typing.get_args(option)):
                return True
        elif origin is tuple:
            if isinstance(value, (list, tuple)):
                items = _items(option, len(value))
                return len(value) == len(items) and all(map(fits, value, items))
        elif origin is list:
            (item,) = typing.get_args(option)
            if isinstance(value, list) and all(fits(v, item) for v in value):
                return True
        elif origin is dict:
            if isinstance(value, dict) and all(isinstance(key, str) for key in value):
                return True
        elif option is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return True
        elif type(value) is option:
            return True
    return False


def _items(option: Any, length: int) -> tuple[Any, ...]:
    """Types of a tuple's entries; ``tuple[float, ...]`` takes any number of them."""
    items = typing.get_args(option)
    return items[:1] * length if items[-1] is Ellipsis else items


def _widen(value: Any, annotation: Any) -> Any:
    """An integer given for a float field becomes a float."""
    wants_float = float in _options(annotation) and int not in _options(annotation)
    return float(value) if wants_float and type(value) is int else value


def describe(annotation: Any) -> str:
    """An annotated type in words."""
    words = []
    for option in _options(annotation):
        origin = typing.get_origin(option)
        if origin is typing.Literal:
            words.append("one of " + ", ".join(map(str, typing.get_args(option))))
        elif origin is tuple:
            any_number = typing.get_args(option)[-1] is Ellipsis
            items = _items(option, 2)
            example = ",".join("1" if item is int else "0.5" for item in items)
            words.append(f"{'' if any_number else f'{len(items)} '}numbers such as [{example}]")
        elif origin is dict:
            words.append("names with values")
        elif origin is list:
            (item,) = typing.get_args(option)
            words.append("a list such as " + ("[0.5,1]" if item is float else '["a","b"]'))
        else:
            words.append("null" if option is type(None) else f"{option.__name__}")
    return " or ".join(words)
