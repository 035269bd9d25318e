"""Models that are not as they were made, so that no default hides a mistake."""

from __future__ import annotations

import torch
from torch import nn


def disturb(model, generator):
    """Batch statistics, biases and memory of a model or a head unlike their initial values."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.normal_(0, 0.2, generator=generator)
        head = getattr(model, "head", model)
        if hasattr(head, "memory"):
            head.memory.memory.normal_(0.5, 0.5, generator=generator)
    return model


def disturbed(model, generator):
    """The same, in float64 and evaluation mode."""
    return disturb(model, generator).double().eval()
