"""Which of torchvision's models are accelerated: those that end in ``F.interpolate``."""

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


class _Model(Swapped):
    """The new method of ``_SimpleSegmentationModel`` and ``LRASPP``."""

    classifier: Any
    forward = postponing("forward")

    def logits_channels(self) -> int:
        return last_channels(self.classifier)


def _places(model: Any) -> Iterator[Place]:
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        if library_class(module, "torchvision", "_SimpleSegmentationModel", "LRASPP"):
            reason = too_few(last_channels(module.classifier))
            what = 'the upsampling of "out" and "aux" waits for what reads them'
            yield upsampling(name, module, _Model, what, reason)


LIBRARY = Library("torchvision", _places, "FCN, DeepLabV3 and LRASPP")
accelerate, restore, explain = LIBRARY.accelerate, LIBRARY.restore, LIBRARY.explain
