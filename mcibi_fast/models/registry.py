"""Creates models by name: any framework with any memory or none, for images or for videos."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from mcibi_fast.models.backbones import Pretrained, create_backbone, set_drop_path
from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.mcibi import MCIBIHead
from mcibi_fast.models.mcibipp import MCIBIPPHead
from mcibi_fast.models.plain_head import PlainHead
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.models.video import VideoHead, VideoSegmentor, load_image_weights, own_checkpoint
from mcibi_fast.models.weights import find_weights, read_spec

HISTORY = 2  # number of past frames of a video model if none is given

_FRAMEWORKS: dict[str, _Framework] = {}
_MEMORIES: dict[str, tuple[str, type[SegmentationHead]]] = {
    "mcibi": ("MCIBI", MCIBIHead),
    "mcibipp": ("MCIBI++", MCIBIPPHead),
}
_Class = TypeVar("_Class", bound=type[SegmentationHead])


class _Framework(NamedTuple):
    title: str
    cls: type[SegmentationHead]


class ModelKind(NamedTuple):
    """The parts that a model is combined from.

    Attributes:
        framework: one of :func:`frameworks`.
        memory: one of :func:`memories`, or None.
        history: number of past frames; 0 for an image model.
    """

    framework: str
    memory: str | None = None
    history: int = 0

    @property
    def name(self) -> str:
        """The combination in one word, such as "upernet_video_mcibipp".

        It does not contain the number of past frames.
        """
        parts = (self.framework, "video" if self.history else None, self.memory)
        return "_".join(part for part in parts if part)

    @property
    def title(self) -> str:
        """The combination as it is written in tables, such as "UPerNet + Video-MCIBI++"."""
        title = _FRAMEWORKS[self.framework].title
        if self.memory is None:
            return title
        return f"{title} + {'Video-' * (self.history > 0)}{_MEMORIES[self.memory][0]}"


def framework(name: str, title: str) -> Callable[[_Class], _Class]:
    """Class decorator that declares a framework.

    Args:
        name: its name in :func:`create`, in lower case and without "_".
        title: its name as it is written in tables, such as "PSPNet".
    """

    def declare(cls: _Class) -> _Class:
        _FRAMEWORKS[name] = _Framework(title, cls)
        return cls

    return declare


def frameworks() -> list[str]:
    """Names of all frameworks."""
    return sorted(_FRAMEWORKS)


def memories() -> list[str]:
    """Names of all memories."""
    return sorted(_MEMORIES)


def names() -> list[str]:
    """The one-word names of all combinations, which :func:`create` also takes."""
    return sorted(kind.name for kind in _kinds())


def parse(name: str, memory: str | None = None, history: int | None = None) -> ModelKind:
    """The parts of the model that a name and further arguments describe.

    Args:
        name: a framework, or one of :func:`names`, which includes the memory.
        memory: one of :func:`memories`.
        history: number of past frames; None means 0, or 2 if the name contains "video".

    Raises:
        ValueError: an unknown name or memory, a name that contradicts the other arguments, or past
            frames without a memory.
    """
    known, *rest = name.split("_")
    video = rest[:1] == ["video"]
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
    own = rest[video] if rest[video:] else None
    if own and memory not in (None, own):
        raise ValueError(f"memory: {name!r} has {own!r}, not {memory!r}")
    if history is None:
        history = HISTORY if video else 0
    if history < 0 or (video and history < 1):
        raise ValueError(f"history: expected at least {int(video)} past frames, got {history}")
    kind = ModelKind(known, own or memory, history)
    if kind.history and kind.memory is None:
        raise ValueError(
            f"history: {known} gathers from past frames only with a memory; give "
            f"memory={' or '.join(map(repr, memories()))}"
        )
    return kind


def head_type(
    framework: str, memory: str | None = None, *, video: bool = False
) -> type[SegmentationHead]:
    """The class of a head: it inherits from a framework and from the head of a memory.

    Without a memory the second is :class:`PlainHead`.

    Args:
        framework: one of :func:`frameworks`.
        memory: one of :func:`memories`, or None.
        video: whether the head also takes past frames.
    """
    return _head_type(ModelKind(framework, memory, int(video)))


@functools.cache  # one class of each kind: instances are compared and pickled by it
def _head_type(kind: ModelKind) -> type[SegmentationHead]:
    answers = _FRAMEWORKS[kind.framework].cls
    forward = PlainHead if kind.memory is None else _MEMORIES[kind.memory][1]
    bases = (VideoHead, answers, forward) if kind.history else (answers, forward)
    document = f"{kind.title}: {', '.join(f':class:`{base.__name__}`' for base in bases)}."
    return type(_head_name(kind), bases, {"__doc__": document, "__module__": __name__})


def create(
    framework: str,
    num_classes: int,
    backbone: str = "resnet50",
    *,
    memory: str | None = None,
    history: int | None = None,
    output_stride: int = 8,
    pretrained: Pretrained = False,
    drop_path: float | None = None,
    **options: Any,
) -> Segmentor:
    """Creates a model: any framework on any backbone, with any memory or none.

    With past frames it is a video model.

    Args:
        framework: "fcn", "pspnet", "upernet", "deeplabv3", "isnet", ... (:func:`frameworks`); or a
            name that includes the memory, such as "upernet_mcibipp" (:func:`names`).
        num_classes: K.
        backbone: any timm model with ``features_only``.
        memory: "mcibipp" (MCIBI++), "mcibi" (the conference version, Memory-R of Table 3), or None
            for the baseline.
        history: h, the number of past frames from which context is taken (Eq. 19); the default, 0,
            gives an image model.
        output_stride: stride of the backbone's last map.
        pretrained: True loads timm's weights, a path loads that file. For a video model it may also
            be a checkpoint of this package (a run's directory or a ``.safetensors`` file) of the
            image model with the same options: see :func:`load_image_weights`.
        drop_path: see :func:`set_drop_path`; None keeps timm's rate.
        options: options of the head: see the framework's class (:class:`FCN`, :class:`PSPNet`, ...)
            and :class:`PlainHead`, :class:`MCIBIPPHead`, :class:`MCIBIHead` or :class:`VideoHead`.

    Raises:
        ValueError: an unknown name, or a backbone that cannot be used (the message says why).
        TypeError: an option that the model does not have.
    """
    kind = parse(framework, memory, history)
    head = head_type(kind.framework, kind.memory, video=kind.history > 0)
    checkpoint = own_checkpoint(pretrained) if kind.history else None
    body = create_backbone(
        backbone,
        output_stride=output_stride,
        pretrained=False if checkpoint else pretrained,
    )
    if kind.history:
        options["history"] = kind.history
    made = head(num_classes, body.channels, **options)
    model = VideoSegmentor(body, made) if kind.history else Segmentor(body, made)
    if drop_path is not None:
        set_drop_path(model.backbone, drop_path)
    if checkpoint and isinstance(model, VideoSegmentor):
        load_image_weights(model, checkpoint)
    model.normalisation = normalisation(backbone, pretrained)
    return model


def normalisation(
    backbone: str, pretrained: Pretrained
) -> tuple[Sequence[float], Sequence[float]] | None:
    """Mean and standard deviation of the images that pretrained weights were trained on.

    Fresh weights have none: None. Weights of timm have those of its ``pretrained_cfg``, and a file
    of such weights, which does not say, those of the backbone's default weights. (timm's
    ``interpolation`` is that of a resize to one size for classification, which is not done here.)

    Args:
        backbone, pretrained: as in :func:`create`.
    """
    if pretrained is False:
        return None
    if checkpoint := own_checkpoint(pretrained):
        spec = read_spec(find_weights(checkpoint))
        return spec.mean, spec.std
    import timm

    try:
        config = timm.get_pretrained_cfg(backbone)
    except RuntimeError:  # no such weights, as creating the model will say
        return None
    return None if config is None else (config.mean, config.std)


def _kinds() -> Iterator[ModelKind]:
    for name in _FRAMEWORKS:
        yield ModelKind(name)
        for memory in _MEMORIES:
            yield from (ModelKind(name, memory), ModelKind(name, memory, HISTORY))


def _head_name(kind: ModelKind) -> str:
    forward = "Head" if kind.memory is None else _MEMORIES[kind.memory][1].__name__
    return f"{_FRAMEWORKS[kind.framework].cls.__name__}{'Video' * (kind.history > 0)}{forward}"


def __getattr__(name: str) -> type[SegmentationHead]:
    """The classes that :func:`head_type` makes, by their names, so that heads can be pickled."""
    for kind in _kinds():
        # Those of FCN also without "FCN", which adds nothing to a head: VideoMCIBIPPHead, ...
        if name in (_head_name(kind), _head_name(kind).removeprefix("FCN")):
            return head_type(kind.framework, kind.memory, video=kind.history > 0)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
