"""Tells our models the learning rate and the epoch under transformers' Trainer."""

from __future__ import annotations

from mcibi_fast.extras import require

require("mcibi_fast.compat.transformers.schedule", "transformers")

from typing import Any

from torch import nn
from transformers import TrainerCallback

from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.nn.observing import lr_factor


class MemorySchedule(TrainerCallback):
    """Calls ``model.schedule`` before every step of the optimiser.

        Trainer(model, ..., callbacks=[MemorySchedule()])

    The momentum of a memory with ``momentum_schedule="poly"`` then follows the learning rate, and
    MCIBI's memory loss begins in the second epoch. Models of other libraries (``with_mcibi``) need
    no callback: the optimiser's step itself sets their momentum.

    Raises:
        TypeError: at the first step, if the model is not one of this package.
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called by the Trainer."""
        model: nn.Module = given["model"]
        if not isinstance(model, Segmentor):
            raise TypeError(
                f"MemorySchedule: expected a model of mcibi_fast, got {type(model).__name__}; "
                "models with a memory by with_mcibi need no callback"
            )
        factor = lr_factor(given["optimizer"].param_groups[0])
        model.schedule(epoch=int(state.epoch or 0), lr_factor=1.0 if factor is None else factor)
