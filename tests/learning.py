"""Whether a training learns, from so many steps that neither luck nor the processor decides it.

One step's loss hangs on the initial weights and on how a processor rounds, which a training makes
larger with each step; means of several steps, after a loss has fallen far, do not.
"""

from __future__ import annotations

from collections.abc import Sequence


def share_left(losses: Sequence[float], *, first: int = 2, last: int = 4) -> float:
    """The mean of the last losses as a share of the mean of the first ones."""
    assert len(losses) >= first + last
    return (sum(losses[-last:]) / last) / (sum(losses[:first]) / first)
