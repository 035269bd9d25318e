"""Models that are not as they were made, so that no default hides a mistake."""

from __future__ import annotations

import torch
from torch import nn


def disturb(model, generator):
    """Batch statistics and memory unlike their initial values."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
        if hasattr(model.head, "memory"):
            model.memory.memory.normal_(0.5, 0.5, generator=generator)
    return model


def disturbed(model, generator):
    """The same, in float64 and evaluation mode."""
    return disturb(model, generator).double().eval()
