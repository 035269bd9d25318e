"""Learning-rate schedule: linear warm-up times poly."""

from __future__ import annotations

from typing import Any

from mcibi_fast.recipes.parts import OptimizerConfig


def poly_factor(step: int, total_steps: int, *, power: float = 0.9, floor: float = 0.0) -> float:
    """Factor on the initial learning rate at a step of the poly schedule.

    ``floor + (1 - floor) * (1 - step / total_steps) ** power``: from 1 down to ``floor``.
    The paper's schedule has power 0.9 and ends at zero; the released code ends at 1% of the
    initial rate, ``floor=0.01``.

    Args:
        step: steps taken so far, 0 at the first.
        total_steps: steps of the whole run.
        power: exponent.
        floor: the factor at the end.
    """
    remaining = 1.0 - min(step / total_steps, 1.0)
    return floor + (1.0 - floor) * remaining**power


def warmup_factor(step: int, warmup_steps: int, *, start: float = 1e-6) -> float:
    """Factor of the linear warm-up: from ``start`` at step 0 to 1 at ``warmup_steps`` and after."""
    if step >= warmup_steps:
        return 1.0
    return start + (1.0 - start) * step / warmup_steps


class Schedule:
    """Sets the learning rates of an optimiser; every group keeps its ratio to the others.

    Args:
        optimizer: whose groups' ``lr`` is the rate at the start.
        config: power, floor and warm-up.
        total_steps: steps of the whole run.

    Attributes:
        lr: the learning rate that a group without a factor of its own has now.
    """

    def __init__(self, optimizer: Any, config: OptimizerConfig, total_steps: int) -> None:
        self.optimizer, self.config, self.total_steps = optimizer, config, total_steps
        self.lr = config.lr
        self.initial = [group["lr"] for group in optimizer.param_groups]

    def apply(self, step: int) -> float:
        """Sets the rates for the step after ``step`` steps; returns their common factor."""
        config = self.config
        factor = poly_factor(step, self.total_steps, power=config.power, floor=config.floor)
        factor *= warmup_factor(step, config.warmup_steps, start=config.warmup_start)
        self.lr = config.lr * factor
        for group, lr in zip(self.optimizer.param_groups, self.initial, strict=True):
            group["lr"] = lr * factor
        return factor
