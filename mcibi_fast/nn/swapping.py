"""Gives an object other methods in place by replacing its class; it can be copied and undone.

The new class derives from the mixin with the new methods and from the object's own class, so that
weights, hooks, ``isinstance`` and the class's name stay. An object may be given several mixins one
after the other, and each can be taken away again. Pickle cannot find a class that was made while
the program ran: it stores what the class was made of instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_Layers = list[tuple[Any, tuple[str, ...]]]  # mixins with their methods, in the order of the swaps


class Swapped:
    """Base of the mixins with new methods.

    Attributes:
        methods: the names of the new methods.
        suffix: what the class's name gets behind it.
        made_of: the arguments of `subclass` that made the class; its last swap, if it has several.
    """

    methods: tuple[str, ...] = ("forward",)
    suffix = ""
    made_of: tuple[Any, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, _recipe(type(self)), super().__reduce_ex__(protocol)[2]


def swap(target: Any, own: type[Swapped], methods: tuple[str, ...] | None = None) -> None:
    """Replaces methods of an object; does nothing if it has those of ``own`` already.

    Args:
        target: any object.
        own: the mixin.
        methods: those of ``own.methods`` to replace; None for all.
    """
    if not isinstance(target, own):
        made_of: tuple[Any, ...] = (own, type(target), methods or own.methods)
        target.__class__ = subclass(*made_of)


def restore(target: Any, own: type[Swapped]) -> bool:
    """Takes the methods of ``own`` away from the object again; returns whether it had them."""
    if not isinstance(target, own):
        return False
    cls, layers = _recipe(type(target))
    target.__class__ = _made(cls, [layer for layer in layers if layer[0] is not own])
    return True


def original(target: Any) -> type:
    """The class that an object had before it was swapped, or has."""
    return _recipe(type(target))[0]


def _recipe(cls: Any) -> tuple[type, _Layers]:
    """The class before any swap, and the swaps."""
    layers: _Layers = []
    while issubclass(cls, Swapped):
        own, cls, methods = cls.made_of
        layers.insert(0, (own, methods))
    return cls, layers


def _made(cls: type, layers: _Layers) -> Any:
    """The class that `_recipe` describes."""
    for own, methods in layers:
        cls = subclass(own, cls, methods)
    return cls


@functools.cache
def subclass(own: Any, original: Any, methods: tuple[str, ...]) -> Any:
    """The class with these methods of the mixin; all others are those of ``original``."""
    body: dict[str, Any] = {
        name: _documented(getattr(own, name), getattr(original, name))
        if name in methods
        else getattr(original, name)
        for name in own.methods
    }
    # With the module of the original: torch.fx takes those of torch.nn for a whole.
    names = ("__module__", "__qualname__", "__doc__")
    body |= {name: getattr(original, name) for name in names}
    body["made_of"] = (own, original, methods)
    return type(original.__name__ + own.suffix, (own, original), body)


def _documented(new: Callable[..., Any], old: Callable[..., Any]) -> Callable[..., Any]:
    """The new method with the signature of the old one, which Hugging Face's Trainer reads."""

    @functools.wraps(old)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return new(self, *args, **kwargs)

    return method


def _revive(cls: type, layers: _Layers) -> Any:
    """The empty object that copying and unpickling then fill."""
    made = _made(cls, layers)
    return made.__new__(made)
