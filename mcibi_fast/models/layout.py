"""The layout in which a model's convolutions compute."""

from __future__ import annotations

import torch
from torch import nn

from mcibi_fast.models.depthwise import depthwise_in_float32


def prepare_convolutions(model: nn.Module) -> None:
    """What every model of this package gets when it is made: the layout and precision that are
    fastest, see :func:`to_channels_last` and :func:`depthwise_in_float32`; in place.
    """
    to_channels_last(model)
    depthwise_in_float32(model)


def to_channels_last(model: nn.Module) -> None:
    """Puts the weights of all 2-D convolutions in channels_last, in place.

    The convolutions then give maps in channels_last, whatever the layout of the images is. That is
    faster, on the CPU as on GPUs, and this package's ops read such maps without a copy. Names,
    shapes and values stay. Unlike ``model.to(memory_format=...)`` it works while a model is built
    without values.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
