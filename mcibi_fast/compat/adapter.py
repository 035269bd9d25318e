"""What `accelerate`, `restore` and `explain` of every library have in common.

A library says which objects in a model can get new methods (its *places*) and which it leaves alone
and why. Most need one thing: that ``F.interpolate`` of the logits is postponed in one of their
methods (:mod:`mcibi_fast.compat.upsampled`), which otherwise runs as the library wrote it. So
every convention of its losses is the library's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mcibi_fast.compat.upsampled import upsample
from mcibi_fast.compat.views import bilinear_arguments
from mcibi_fast.nn import swapping
from mcibi_fast.nn.swapping import Swapped

_T = TypeVar("_T")


_COMPILE_PARTS = "; under torch.compile of the whole model nothing waits: compile its parts"


class Place(NamedTuple):
    """An object that can get new methods, or one that is left alone.

    Attributes:
        name: where it is in the model, such as "decode_head"; "" for the model itself.
        target: the object.
        own: the mixin with its new methods; None if it is left alone.
        why: what changes, or why it is left alone.
        methods: those of the mixin to use; None for all.
    """

    name: str
    target: Any
    own: type[Swapped] | None
    why: str
    methods: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'}: {type(self.target).__name__}: {self.why}"

    @property
    def replaced(self) -> bool:
        return self.own is not None and isinstance(self.target, self.own)


class Explanation(NamedTuple):
    """What `accelerate` has replaced in a model, would replace, and leaves alone; prints as text.

    Attributes:
        replaced: the places whose methods are replaced now.
        replaceable: those that `accelerate` would replace.
        left_alone: those that stay as they are; ``why`` says the reason.
    """

    replaced: list[Place]
    replaceable: list[Place]
    left_alone: list[Place]

    def __str__(self) -> str:
        titles = ("replaced", "to be replaced by accelerate", "left alone")
        lines = []
        for title, places in zip(titles, self, strict=True):
            if places:
                lines += [f"{title}:", *(f"  {place}" for place in places)]
        return "\n".join(lines)


class Library:
    """The three functions for one library.

    Args:
        name: of the library.
        places: finds the places of a model.
        known: what it accelerates, for the error on an unknown model.
    """

    def __init__(self, name: str, places: Callable[[Any], Iterator[Place]], known: str) -> None:
        self.name, self.known = name, known
        self._places = places

    def accelerate(self, model: _T) -> _T:
        """Gives the places their new methods, in place.

        Raises:
            ValueError: there is none.
        """
        found = self.places(model)
        wanted = [place for place in found if place.own is not None]
        if not wanted:
            reasons = "".join(f"; {place}" for place in found)
            raise ValueError(
                f"compat.{self.name}.accelerate: nothing in {type(model).__name__} can be made "
                f"faster (it accelerates {self.known}){reasons}"
            )
        for place in wanted:
            assert place.own is not None
            swapping.swap(place.target, place.own, place.methods)
        return model

    def restore(self, model: _T) -> _T:
        """Gives the places their own methods back, in place.

        Raises:
            ValueError: none was replaced.
        """
        places = [place for place in self.places(model) if place.own is not None]
        undone = [swapping.restore(place.target, place.own) for place in places if place.own]
        if not any(undone):
            raise ValueError(
                f"compat.{self.name}.restore: nothing in {type(model).__name__} is accelerated"
            )
        return model

    def explain(self, model: Any) -> Explanation:
        """What is replaced, what can be, what is left alone and why.

        Raises:
            ValueError: it holds nothing of this library.
        """
        found = self.places(model)
        if not found:
            raise ValueError(
                f"compat.{self.name}.explain: {type(model).__name__} holds no model of "
                f"{self.name} that it knows; it accelerates {self.known}"
            )
        return Explanation(
            [place for place in found if place.replaced],
            [place for place in found if place.own is not None and not place.replaced],
            [place for place in found if place.own is None],
        )

    def places(self, model: Any) -> list[Place]:
        return list(self._places(model))


def library_class(target: Any, library: str, *names: str) -> type | None:
    """The class of the library, by its name, that the object's class is or derives from."""
    for base in type(target).__mro__:
        own = not issubclass(base, Swapped) and base.__module__.split(".")[0] == library
        if own and base.__name__ in names:
            return base
    return None


def last_channels(module: Any) -> int:
    """K: the channels of the module's last convolution, by the order of registration."""
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)][-1].out_channels


def too_few(classes: int) -> str | None:
    """Why logits of so many classes are left alone, if they are."""
    if classes > 1:
        return None
    return "one class: its upsampled logits are no larger than the labels, so they are formed"


def upsampling(
    name: str, target: nn.Module, own: type[Swapped], what: str, reason: str | None
) -> Place:
    """A module whose upsampling waits, which is ``what`` changes; or is left alone for a reason."""
    if reason:
        return Place(name, target, None, reason)
    return Place(name, target, own, what + _COMPILE_PARTS)


# --- postponed interpolation --------------------------------------------------------------------


class Postponing(TorchFunctionMode):
    """While it is active, ``F.interpolate`` of logits is `upsample`.

    Args:
        channels: K, by which logits are told from other maps; None for all maps.
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.channels = channels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        input = args[0] if args else kwargs.get("input")
        if func is F.interpolate and type(input) is Tensor:
            asked = bilinear_arguments(*args, **kwargs)
            if asked is not None and self.channels in (None, input.shape[1]):
                return upsample(input, *asked)
        return func(*args, **kwargs)


def postponing(method: str) -> Callable[..., Any]:
    """A method that runs the object's own of this name while interpolations are postponed.

    A compiler traces the object's own method alone, and fuses what it can itself.
    """

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        mixin = next(cls for cls in type(self).__mro__ if vars(cls).get(method) is run)
        own = getattr(super(mixin, self), method)
        if torch.compiler.is_compiling():
            return own(*args, **kwargs)
        with Postponing(self.logits_channels()):
            return own(*args, **kwargs)

    return run
