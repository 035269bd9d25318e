"""Which parts of mmsegmentation's models are accelerated: the heads that upsample their logits."""

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

# Heads with losses of their own, on masks, points or depths, which do not upsample logits.
_OTHERS = {
    "MaskFormerHead": "its losses are of masks, each with a class",
    "Mask2FormerHead": "its losses are of masks at points",
    "SideAdapterCLIPHead": "its losses are of masks",
    "PointHead": "its loss is of points",
    "VPDDepthHead": "it predicts depth",
}


class _Head(Swapped):
    """The new methods of ``BaseDecodeHead``."""

    methods = ("loss_by_feat", "predict_by_feat")
    out_channels: int
    loss_by_feat = postponing("loss_by_feat")
    predict_by_feat = postponing("predict_by_feat")

    def logits_channels(self) -> int:
        return self.out_channels


def _places(model: Any) -> Iterator[Place]:
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        other = library_class(module, "mmseg", *_OTHERS)
        if other is not None:
            yield Place(name, module, None, _OTHERS[other.__name__])
        elif library_class(module, "mmseg", "BaseDecodeHead"):
            reason = too_few(module.out_channels)
            what = (
                "the upsampling waits for what reads the logits (sliding windows read them; and "
                "so does a second resize, of an image whose original size is another)"
            )
            yield upsampling(name, module, _Head, what, reason)
            if not reason:
                yield from _readers(name, module)


def _readers(name: str, head: Any) -> Iterator[Place]:
    """The parts of a head that compute the upsampled logits because they read their values."""
    if getattr(head, "sampler", None) is not None:
        yield Place(
            f"{name}.sampler",
            head.sampler,
            None,
            "it reads the upsampled logits, so they are formed for it and for the losses",
        )
    losses = head.loss_decode if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]
    for loss in losses:
        exact = library_class(loss, "mmseg", "CrossEntropyLoss") and not (
            loss.use_sigmoid or loss.use_mask
        )
        if not exact and getattr(loss, "reads_logits", True):
            yield Place(f"{name}.loss_decode", loss, None, "it reads the upsampled logits")


LIBRARY = Library("mmseg", _places, "decode heads that derive from BaseDecodeHead")
accelerate, restore, explain = LIBRARY.accelerate, LIBRARY.restore, LIBRARY.explain
