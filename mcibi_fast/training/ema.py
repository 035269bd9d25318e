"""Exponential moving average of the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mcibi_fast.models import Segmentor
from mcibi_fast.nn.transient import states


class WeightAverage:
    """A copy of a model whose parameters follow the model's: ``decay * own + (1 - decay) * new``.

    Buffers are not averaged but copied: the running statistics of the batch norms, the memory and
    its noise state are those of the model. (They are moving averages already, although of the
    features computed with the model's latest weights, not with the averaged ones.)

    torch's ``AveragedModel`` does the same, but copies its step counter to the device at each step
    and waits for the copy.

    Args:
        model: on its device, without wrappers; the average starts from its weights.
        decay: decay of the average, in [0, 1).

    Attributes:
        model: the averaged model, in evaluation mode.
    """

    def __init__(self, model: Segmentor, decay: float) -> None:
        self.model: Segmentor = copy.deepcopy(model).eval().requires_grad_(False)
        self._average: Any = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: Segmentor) -> None:
        """Moves the average towards the model's weights; once per optimiser step."""
        own = [p.detach() for p in self.model.parameters()]
        self._average(own, [p.detach() for p in model.parameters()], None)
        for buffer, new in zip(states(self.model), states(model), strict=True):
            buffer.copy_(new)
