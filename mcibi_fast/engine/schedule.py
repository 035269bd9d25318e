"""Learning-rate schedule."""

from __future__ import annotations


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
