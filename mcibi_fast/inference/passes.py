"""What evaluations of images and of videos share: the model's place and mode, progress, the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from mcibi_fast import ops
from mcibi_fast.inference.precision import autocast, mixed_precision_of, precision_of
from mcibi_fast.models import Segmentor
from mcibi_fast.models.weights import Precision
from mcibi_fast.nn.mode import in_mode
from mcibi_fast.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Place:
    """Where a process evaluates.

    Attributes:
        rank, world_size: number of this process, and how many processes there are.
        device: the model's device.
        precision: in which the model computes.
        autocast: a context for its calls, which sees to this.
    """

    rank: int
    world_size: int
    device: torch.device
    precision: Precision
    autocast: Callable[[], AbstractContextManager]


def place_of(
    model: Segmentor,
    accelerator: Accelerator | None,
    device: torch.device | str | None,
    precision: Precision | None = None,
) -> Place:
    """The accelerator's place; without one, alone on ``device`` or where the model is.

    For the precision see `precision.precision_of`.
    """
    rank, world_size = 0, 1
    if accelerator is not None:
        rank, world_size = accelerator.process_index, accelerator.num_processes
        device = accelerator.device
    device = torch.device(device if device is not None else next(model.parameters()).device)
    found = precision_of(model, device, precision, accelerator)
    if accelerator is not None and found == mixed_precision_of(accelerator):
        return Place(rank, world_size, device, found, accelerator.autocast)
    return Place(rank, world_size, device, found, partial(autocast, device, found))


@contextmanager
def evaluation_pass(
    model: nn.Module,
    place: Place,
    *,
    total: int,
    unit: str,
    progress: bool,
    interrupted: Callable[[], bool] | None,
) -> Iterator[Callable[[int], None]]:
    """Evaluation mode, with its progress shown (on the main process); see `in_mode`.

    Yields a function to call after each step with the number of units done; it raises
    KeyboardInterrupt if ``interrupted`` returns true. At the end labels are checked
    (``ops.check_labels``).
    """
    show = progress and place.rank == 0
    with (
        in_mode(model, training=False),
        Progress("evaluate", unit=unit, total=total, show=show) as shown,
    ):

        def done(count: int) -> None:
            shown.advance(count)
            if interrupted is not None and interrupted():
                raise KeyboardInterrupt

        yield done
    ops.check_labels()
