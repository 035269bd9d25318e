"""Losses that wait on the device until the host reads them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from mcibi_fast import ops
from mcibi_fast.errors import TrainingError


class NotFinite(ArithmeticError):
    """A loss that is not finite: the message names the step and the terms."""

    def explained(self, last: Path | None) -> TrainingError:
        """The error for the user, with the last checkpoint and what to try."""
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        return TrainingError(
            f"the loss is not finite {self}; {good}; try a lower optimizer.lr, "
            "optimizer.clip_norm, or mixed_precision=no"
        )


class LossReadings:
    """Collects losses without waiting for the device, and reads many at once."""

    def __init__(self) -> None:
        self._unread: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        """Keeps a step's losses."""
        self._unread.append((step, losses))

    def recent(self) -> float:
        """Waits for the device; the mean loss of this rank since the last reading."""
        steps = [torch.stack(list(losses.values())).sum() for _, losses in self._unread]
        return float(torch.stack(steps).mean())

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Waits for the device; each term's mean over ranks and the steps since the last reading.

        Raises:
            NotFinite: a term of a step is not.
            ValueError: a label was neither a class nor ignored (found on a GPU).
        """
        steps = [step for step, _ in self._unread]
        names = list(self._unread[0][1])
        values = torch.stack([torch.stack([terms[n] for n in names]) for _, terms in self._unread])
        values = accelerator.reduce(values.float(), "mean").cpu()
        self._unread.clear()
        ops.check_labels()
        for step, row in zip(steps, values.tolist(), strict=True):
            if not all(math.isfinite(value) for value in row):
                terms = ", ".join(f"{n} {v:g}" for n, v in zip(names, row, strict=True))
                raise NotFinite(f"at step {step} ({terms})")
        return dict(zip(names, values.mean(0).tolist(), strict=True))
