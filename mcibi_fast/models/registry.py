"""Frameworks, memories and methods for videos by their names, and the heads that combine them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.mcibi import MCIBIHead
from mcibi_fast.models.mcibipp import MCIBIPPHead
from mcibi_fast.models.plain_head import PlainHead
from mcibi_fast.models.video import VideoHead, VideoMethod

HISTORY = 2  # number of past frames of a video model if none is given

_FRAMEWORKS: dict[str, _Framework] = {}
_METHODS: dict[str, _Method] = {}
_MEMORIES: dict[str, tuple[str, type[SegmentationHead]]] = {
    "mcibi": ("MCIBI", MCIBIHead),
    "mcibipp": ("MCIBI++", MCIBIPPHead),
}
_Class = TypeVar("_Class", bound=type[SegmentationHead])
_MethodClass = TypeVar("_MethodClass", bound=type[VideoMethod])


class _Framework(NamedTuple):
    title: str
    cls: type[SegmentationHead]
    source: str
    context: str
    memories: bool


class _Method(NamedTuple):
    title: str
    cls: type[VideoMethod]
    source: str
    context: str
    frameworks: Sequence[str] | None
    memories: bool


class ModelKind(NamedTuple):
    """The parts that a model is combined from.

    Attributes:
        framework: one of :func:`frameworks`.
        memory: one of :func:`memories`, or None.
        history: number of past frames; 0 for an image model.
        method: one of :func:`video_methods`; None for an image model and for Video-MCIBI++.
    """

    framework: str
    memory: str | None = None
    history: int = 0
    method: str | None = None

    @property
    def name(self) -> str:
        """The combination in one word, such as "upernet_video_mcibipp".

        It does not contain the number of past frames.
        """
        video = self.method or ("video" if self.history else None)
        return "_".join(part for part in (self.framework, video, self.memory) if part)

    @property
    def title(self) -> str:
        """The combination as it is written in tables, such as "UPerNet + Video-MCIBI++"."""
        title = _FRAMEWORKS[self.framework].title
        if self.method is not None:
            title = f"{_METHODS[self.method].title}+{title}"
        if self.memory is None:
            return title
        if self.method is not None:
            return f"{title} + {_MEMORIES[self.memory][0]}"
        return f"{title} + {'Video-' * (self.history > 0)}{_MEMORIES[self.memory][0]}"


def framework(
    name: str, title: str, *, source: str = "", context: str = "", memories: bool = True
) -> Callable[[_Class], _Class]:
    """Class decorator that declares a framework.

    Args:
        name: its name in :func:`mcibi_fast.models.create`, in lower case and without "_".
        title: its name as it is written in tables, such as "PSPNet".
        source: where it was published, such as "arXiv 1612.01105".
        context: in a few words, what it gathers within the image.
        memories: whether it can be combined with a memory.
    """

    def declare(cls: _Class) -> _Class:
        _FRAMEWORKS[name] = _Framework(title, cls, source, context, memories)
        return cls

    return declare


def video_method(
    name: str,
    title: str,
    *,
    source: str,
    context: str,
    frameworks: Sequence[str] | None = None,
    memories: bool = False,
) -> Callable[[_MethodClass], _MethodClass]:
    """Class decorator that declares a method for videos, which is combined with a framework.

    Args:
        name: the second part of its models' names, as "tcb" in "pspnet_tcb".
        title, source: as for :func:`framework`.
        context: in a few words, what it takes from other frames.
        frameworks: the frameworks that it can be combined with; None means all.
        memories: whether its models can have a memory.
    """

    def declare(cls: _MethodClass) -> _MethodClass:
        _METHODS[name] = _Method(title, cls, source, context, frameworks, memories)
        return cls

    return declare


def described_method(name: str) -> tuple[str, str, str]:
    """As :func:`described`, of a method for videos: what it takes from other frames."""
    method = _METHODS[name]
    return method.title, method.source, method.context


def described(name: str) -> tuple[str, str, str]:
    """The title of a framework, where it was published, and what it gathers within the image."""
    title, _, source, context, _ = _FRAMEWORKS[name]
    return title, source, context


def combines(name: str, method: str | None = None) -> bool:
    """Whether a framework can be combined with a memory; for videos, by this method."""
    return _FRAMEWORKS[name].memories and (method is None or _METHODS[method].memories)


def takes(method: str, framework: str) -> bool:
    """Whether a method for videos can be combined with a framework."""
    possible = _METHODS[method].frameworks
    return possible is None or framework in possible


def _check_combines(kind: ModelKind) -> None:
    if kind.memory is not None and not combines(kind.framework):
        raise ValueError(
            f"memory: {kind.framework} cannot be combined with a memory; these can: "
            f"{', '.join(name for name in frameworks() if combines(name))}"
        )
    if kind.method is None:
        return
    if not takes(kind.method, kind.framework):
        raise ValueError(
            f"method: {kind.method} cannot be combined with {kind.framework}; it can be with "
            f"{', '.join(name for name in frameworks() if takes(kind.method, name))}"
        )
    if kind.memory is not None and not combines(kind.framework, kind.method):
        raise ValueError(f"memory: {kind.method} cannot be combined with a memory")


def frameworks() -> list[str]:
    """Names of all frameworks."""
    return sorted(_FRAMEWORKS)


def memories() -> list[str]:
    """Names of all memories."""
    return sorted(_MEMORIES)


def video_methods() -> list[str]:
    """Names of all methods for videos but Video-MCIBI++, which is a memory with past frames."""
    return sorted(_METHODS)


def usual_gap(method: str | None) -> int:
    """Number of frames from one frame of a clip to the next, if none is given."""
    return 1 if method is None else _METHODS[method].cls.usual_gap


def names() -> list[str]:
    """The one-word names of all combinations, which :func:`mcibi_fast.models.create` also takes."""
    return sorted(kind.name for kind in _kinds())


def parse(
    name: str,
    memory: str | None = None,
    history: int | None = None,
    method: str | None = None,
) -> ModelKind:
    """The parts of the model that a name and further arguments describe.

    Args:
        name: a framework, or one of :func:`names`, which includes the memory.
        memory: one of :func:`memories`.
        history: number of past frames; None means 0, 2 if the name contains "video", or the usual
            number of the method.
        method: one of :func:`video_methods`.

    Raises:
        ValueError: an unknown name, memory or method, a name that contradicts the other arguments,
            parts that cannot be combined, or past frames without a memory or a method.
    """
    known, *rest = name.split("_")
    video = rest[:1] == ["video"]
    named = rest.pop(0) if rest and rest[0] in _METHODS else None
    if known not in _FRAMEWORKS or rest[video:] not in ([], *([m] for m in _MEMORIES)):
        combined = ", ".join(other for other in names() if other.startswith("fcn"))
        raise ValueError(
            f"name: no model {name!r}; there are {', '.join(frameworks())}, each also with a "
            f"memory: {combined}"
        )
    if memory is not None and memory not in _MEMORIES:
        raise ValueError(
            f"memory: no memory {memory!r}; there are {', '.join(memories())}, or None"
        )
    if method is not None and method not in _METHODS:
        raise ValueError(
            f"method: no method {method!r} for videos; there are {', '.join(video_methods())}"
        )
    if (video or named) and method not in (None, named):
        raise ValueError(f"method: {name!r} has {named or 'video'!r}, not {method!r}")
    method = method or named
    own = rest[video] if rest[video:] else None
    if own and memory not in (None, own):
        raise ValueError(f"memory: {name!r} has {own!r}, not {memory!r}")
    video = video or method is not None
    if history is None:
        history = (_METHODS[method].cls.usual_history if method else HISTORY) if video else 0
    if history < 0 or (video and history < 1):
        raise ValueError(f"history: expected at least {int(video)} past frames, got {history}")
    kind = ModelKind(known, own or memory, history, method)
    _check_combines(kind)
    if kind.history and kind.memory is None and method is None:
        raise ValueError(
            f"history: {known} gathers from past frames only with a memory; give "
            f"memory={' or '.join(map(repr, memories()))}"
        )
    return kind


def head_type(
    framework: str,
    memory: str | None = None,
    *,
    video: bool = False,
    method: str | None = None,
) -> type[SegmentationHead]:
    """The class of a head: it inherits from a framework and from the head of a memory.

    Without a memory the second is :class:`PlainHead`.

    Args:
        framework: one of :func:`frameworks`.
        memory: one of :func:`memories`, or None.
        video: whether the head also takes past frames.
        method: one of :func:`video_methods`; None is :class:`VideoHead`.

    Raises:
        ValueError: parts that cannot be combined.
    """
    kind = ModelKind(framework, memory, int(video), method)
    _check_combines(kind)
    return _head_type(kind)


@functools.cache  # one class of each kind: instances are compared and pickled by it
def _head_type(kind: ModelKind) -> type[SegmentationHead]:
    answers = _FRAMEWORKS[kind.framework].cls
    forward = PlainHead if kind.memory is None else _MEMORIES[kind.memory][1]
    first = _METHODS[kind.method].cls if kind.method else VideoHead
    bases = (first, answers, forward) if kind.history else (answers, forward)
    document = f"{kind.title}: {', '.join(f':class:`{base.__name__}`' for base in bases)}."
    return type(_head_name(kind), bases, {"__doc__": document, "__module__": __name__})


def _kinds() -> Iterator[ModelKind]:
    for name in _FRAMEWORKS:
        yield ModelKind(name)
        for memory in memories() if combines(name) else ():
            yield from (ModelKind(name, memory), ModelKind(name, memory, HISTORY))
        for method in (each for each in _METHODS if takes(each, name)):
            for own in (None, *memories()) if combines(name, method) else (None,):
                yield ModelKind(name, own, _METHODS[method].cls.usual_history, method)


def _head_name(kind: ModelKind) -> str:
    forward = "Head" if kind.memory is None else _MEMORIES[kind.memory][1].__name__
    video = _METHODS[kind.method].cls.__name__ if kind.method else "Video" * (kind.history > 0)
    return f"{_FRAMEWORKS[kind.framework].cls.__name__}{video}{forward}"


def __getattr__(name: str) -> type[SegmentationHead]:
    """The classes that :func:`head_type` makes, by their names, so that heads can be pickled."""
    for kind in _kinds():
        # Those of FCN also without "FCN", which adds nothing to a head: VideoMCIBIPPHead, ...
        if name in (_head_name(kind), _head_name(kind).removeprefix("FCN")):
            return _head_type(kind._replace(history=min(kind.history, 1)))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
