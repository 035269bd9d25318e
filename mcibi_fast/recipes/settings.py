"""Sets any field of a nested dataclass after checking its value's type: ``--set`` and TOML."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        name, text = name.strip(), text.strip()
        _set(config, name, _reader(text), "--set", f"--set {name}={text}")


def apply_table(
    config: Any, table: Mapping[str, Any], source: str, *, also: Sequence[str] = ()
) -> None:
    """Applies nested tables, such as those of a TOML file, to a dataclass in place.

    A table's name is a field that holds fields (``[optimizer]``, then ``lr = 0.02``), or a dict
    field (``[model.options]``). TOML has no null: the text "none" stands for it in a field that may
    be null.

    Args:
        config: see `apply_settings`.
        table: names and values; a name may also contain the dots.
        source: names the file in messages.
        also: names that the file may have besides fields, for the message about an unknown one.

    Raises:
        ValueError: as in `apply_settings`.
    """
    for name, value in _flat(config, table, source, also):
        _set(config, name, _given(value), source, f"{source}: {name}", also)


def _flat(
    config: Any, table: Mapping[str, Any], source: str, also: Sequence[str], parents: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = f"{parents}{key}"
        if not isinstance(value, Mapping):
            yield name, value
        elif value:
            yield from _flat(config, value, source, also, f"{name}.")
        elif f"{name}." not in {part[: len(name) + 1] for part in field_names(config)}:
            raise ValueError(f"{source}: {_unknown(config, name, also)}")


def _given(value: Any) -> Callable[[Any], Any]:
    return lambda annotation: value


def _reader(text: str) -> Callable[[Any], Any]:
    """What a text says where an annotation, or none, asks for a value."""
    return lambda annotation: text if annotation is str else _parse(text)


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


def _set(
    config: Any,
    name: str,
    read: Callable[[Any], Any],
    source: str,
    shown: str,
    also: Sequence[str] = (),
) -> None:
    """Sets a field.

    Args:
        config: holds it.
        name: with dots.
        read: gives the value, from the field's annotation (``Any`` for an option).
        source: begins the message about an unknown field.
        shown: begins the message about a value.
        also: see `apply_table`.
    """
    *parents, last = name.split(".")
    separator = " " if source == "--set" else ": "
    holder = target = config
    for i, part in enumerate(parents):
        holder, target = target, getattr(target, part, None) if _has_field(target, part) else None
        if isinstance(target, dict) and i == len(parents) - 1:
            target[last] = read(Any)
            return
        if not dataclasses.is_dataclass(target):
            raise ValueError(f"{source}{separator}{_unknown(config, name, also)}")
    alias = getattr(type(target), last, None)
    if isinstance(alias, property) and alias.fset is not None:
        value = read(str)  # such as model.name, which sets several fields
        if not isinstance(value, str):
            raise ValueError(f"{shown}: expected str")
        setattr(target, last, value)
        return
    if not _has_field(target, last) or dataclasses.is_dataclass(getattr(target, last)):
        raise ValueError(f"{source}{separator}{_unknown(config, name, also)}")
    annotation = typing.get_type_hints(type(target))[last]
    value = _coerce(shown, read(annotation), annotation)
    if type(target).__dataclass_params__.frozen:
        setattr(holder, parents[-1], dataclasses.replace(target, **{last: value}))
    else:
        setattr(target, last, value)


def _has_field(target: Any, name: str) -> bool:
    return dataclasses.is_dataclass(target) and name in {
        field.name for field in dataclasses.fields(target)
    }


def _unknown(config: Any, name: str, also: Sequence[str] = ()) -> str:
    names = [*field_names(config), *also]
    # "lr" probably means optimizer.lr, so the last part of each name is compared as well.
    by_last = {full.removesuffix(".*").rsplit(".", 1)[-1]: full for full in names}
    near = difflib.get_close_matches(name, names, 1, cutoff=0.75) or [
        by_last[last]
        for last in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, 1, cutoff=0.5)
    ]
    hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(names)}"
    return f"{name}: no such field; {hint}"


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"None": None, "True": True, "False": False}.get(text, text)


def _coerce(shown: str, value: Any, annotation: Any) -> Any:
    is_none = isinstance(value, str) and value.lower() in ("none", "null")
    may_be_none = type(None) in options(annotation)
    if is_none and may_be_none and (str in options(annotation) or not fits(value, annotation)):
        return None
    if not fits(value, annotation):
        raise ValueError(f"{shown}: expected {describe(annotation)}")
    wants_tuple = any(typing.get_origin(option) is tuple for option in options(annotation))
    return tuple(value) if wants_tuple and isinstance(value, list) else _widen(value, annotation)


def _widen(value: Any, annotation: Any) -> Any:
    """The value; an integer for a float field becomes a float."""
    wants_float = float in options(annotation) and int not in options(annotation)
    return float(value) if wants_float and type(value) is int else value
