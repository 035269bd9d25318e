"""The processes of a run: started alone, by torchrun or by accelerate launch."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


def start_accelerator(*, cpu: bool = False, mixed_precision: str = "no") -> Accelerator:
    """Joins the processes that a launcher started; without a GPU they talk through gloo.

    Args:
        cpu: leave a GPU unused.
        mixed_precision: "no", "bf16" or "fp16".

    Raises:
        ValueError: fp16 without a GPU, or the processes cannot be joined on this device.
    """
    cpu = cpu or not torch.accelerator.is_available()
    if cpu and mixed_precision == "fp16":
        raise ValueError(
            "mixed_precision: fp16 needs a GPU; on a CPU use mixed_precision=bf16 or no"
        )
    # Without cpu=True, accelerate would leave several processes without a GPU on their own.
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=cpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes < launched:
        raise ValueError(
            f"the launcher started {launched} processes (WORLD_SIZE), but on "
            f"{accelerator.device.type} they cannot be joined to one run; start one process, or "
            "leave the GPU unused (device=cpu, --cpu)"
        )
    return accelerator


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Calls a function on the main process only; its error is raised on all.

    Raises:
        ValueError, OSError: what the function raised.
    """
    outcome: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except (ValueError, OSError) as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]
