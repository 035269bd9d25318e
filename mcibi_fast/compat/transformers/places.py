"""Which of Hugging Face's models and image processors are accelerated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from mcibi_fast.compat.adapter import (
    Library,
    Place,
    library_class,
    postponing,
    too_few,
    upsampling,
)
from mcibi_fast.nn.swapping import Swapped

_MASKS = (
    "MaskFormerForInstanceSegmentation",
    "Mask2FormerForUniversalSegmentation",
    "OneFormerForUniversalSegmentation",
    "EomtForUniversalSegmentation",
    "DetrForSegmentation",
    "ConditionalDetrForSegmentation",
)
# Classes in which nothing is upsampled that could wait.
_NOTHING = {
    "Sapiens2ForSemanticSegmentation": "its loss is at the size of its logits, not upsampled",
    "OneFormerImageProcessor": "its last resize is antialiased, which is not postponed",
    "SegGptImageProcessor": "its masks are colours, resized to the nearest pixel",
    "SegGptImageProcessorPil": "its masks are colours, resized to the nearest pixel",
    "Sam3ImageProcessor": "its masks are of one class",
}


class _Model(Swapped):
    """The new method of ``...ForSemanticSegmentation``."""

    config: Any
    forward = postponing("forward")

    def logits_channels(self) -> int:
        return self.config.num_labels


class _Processor(Swapped):
    """The new method of an image processor."""

    methods = ("post_process_semantic_segmentation",)
    post_process_semantic_segmentation = postponing("post_process_semantic_segmentation")

    def logits_channels(self) -> None:
        return None


def _places(model: Any) -> Iterator[Place]:
    processor = getattr(model, "image_processor", model)  # of a pipeline or a processor of many
    kind = library_name(processor)
    if kind and hasattr(processor, "post_process_semantic_segmentation"):
        reason = _NOTHING.get(kind)
        what = (
            "the argmax of post_process_semantic_segmentation is of logits that are not resized "
            "(logits that the model has upsampled to another size, as UperNet does, are formed)"
        )
        yield Place("image_processor", processor, None if reason else _Processor, reason or what)
    inner = getattr(model, "model", None) if hasattr(model, "image_processor") else model
    if isinstance(inner, nn.Module):
        yield from _models(inner)


def library_name(target: Any) -> str | None:
    """The name of the class of transformers that the object's class is or derives from."""
    for base in type(target).__mro__:
        if base.__module__.startswith("transformers.") and not issubclass(base, Swapped):
            return base.__name__
    return None


def _models(model: nn.Module) -> Iterator[Place]:
    for name, module in model.named_modules():
        kind = library_name(module)
        if library_class(module, "transformers", *_MASKS):
            yield Place(
                name,
                module,
                None,
                "its losses are of masks; pass its image processor, whose last resize is replaced",
            )
        elif kind is not None and kind.endswith("ForSemanticSegmentation"):
            reason = _NOTHING.get(kind) or too_few(module.config.num_labels)
            what = "the loss reads the logits before they are upsampled"
            yield upsampling(name, module, _Model, what, reason)


LIBRARY = Library(
    "transformers", _places, "classes ...ForSemanticSegmentation, and image processors"
)
accelerate, restore, explain = LIBRARY.accelerate, LIBRARY.restore, LIBRARY.explain
