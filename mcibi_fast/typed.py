"""Checks values that come from text or a file against the types in annotations."""

from __future__ import annotations

import collections.abc
import types
import typing
from typing import Any

_LISTS = (list, collections.abc.Sequence)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value has an annotated type; a list counts as a tuple, too."""
    for option in options(annotation):
        origin = typing.get_origin(option)
        if origin is typing.Literal:
            if any(value == each and type(value) is type(each) for each in typing.get_args(option)):
                return True
        elif origin is tuple:
            if isinstance(value, (list, tuple)):
                items = _items(option, len(value))
                return len(value) == len(items) and all(map(fits, value, items))
        elif origin in _LISTS:
            (item,) = typing.get_args(option)
            if isinstance(value, list) and all(fits(v, item) for v in value):
                return True
        elif origin is dict:
            if isinstance(value, dict) and all(isinstance(key, str) for key in value):
                return True
        elif option is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return True
        elif option is Any or type(value) is option:
            return True
    return False


def describe(annotation: Any) -> str:
    """An annotated type in words."""
    words = []
    for option in options(annotation):
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
        elif origin in _LISTS:
            (item,) = typing.get_args(option)
            examples = {float: "[0.5,1]", int: "[1,2]"}
            words.append("a list such as " + examples.get(item, '["a","b"]'))
        else:
            words.append(
                "null" if option is type(None) else getattr(option, "__name__", str(option))
            )
    return " or ".join(words)


def options(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _items(option: Any, length: int) -> tuple[Any, ...]:
    """Types of a tuple's entries; ``tuple[float, ...]`` accepts any number of them."""
    items = typing.get_args(option)
    return items[:1] * length if items[-1] is Ellipsis else items
