"""Which models of segmentation_models_pytorch are accelerated: those whose head upsamples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from mcibi_fast.compat.adapter import (
    Library,
    Place,
    last_channels,
    library_class,
    postponing,
    too_few,
    upsampling,
)
from mcibi_fast.nn.swapping import Swapped


class _Head(Swapped):
    """The new method of ``SegmentationHead`` and ``DPTSegmentationHead``."""

    forward = postponing("forward")

    def logits_channels(self) -> int:
        return last_channels(self)


def _places(model: Any) -> Iterator[Place]:
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        if library_class(
            module, "segmentation_models_pytorch", "SegmentationHead", "DPTSegmentationHead"
        ):
            reason = _reason(module)
            what = "the upsampling (align_corners=True) waits for what reads the logits"
            yield upsampling(name, module, _Head, what, reason)


def _reason(head: Any) -> str | None:
    """Why this head is left alone, if it is."""
    dpt = hasattr(head, "upsampling_factor")
    if (head.upsampling_factor <= 1) if dpt else isinstance(head[1], nn.Identity):
        return "it does not upsample: the decoder ends at the size of the image"
    activation = (head.activation if dpt else head[2]).activation
    over_classes = getattr(activation, "dim", None) == 1  # a softmax2d or an argmax2d can wait
    if not isinstance(activation, nn.Identity) and not over_classes:
        return f"its activation ({type(activation).__name__}) reads the upsampled logits"
    return too_few(last_channels(head))


LIBRARY = Library(
    "smp",
    _places,
    "DeepLabV3, DeepLabV3Plus, DPT, FPN, PAN, PSPNet, Segformer and UPerNet, whose heads upsample",
)
accelerate, restore, explain = LIBRARY.accelerate, LIBRARY.restore, LIBRARY.explain
