"""The processes of a run: started alone, by torchrun or by accelerate launch."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


def start_accelerator(*, cpu: bool = False, mixed_precision: str = "no") -> Accelerator:
    """Joins the processes that a launcher started; without a GPU they talk through gloo.

    Args:
        cpu: leave a GPU unused.
        mixed_precision: "no", "bf16" or "fp16"; see `precision.with_precision`.

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
    atexit.register(leave_group)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes < launched:
        raise ValueError(
            f"the launcher started {launched} processes (WORLD_SIZE), but on "
            f"{accelerator.device.type} they cannot be joined to one run; start one process, or "
            "leave the GPU unused (device=cpu, --cpu)"
        )
    return accelerator


def leave_group() -> None:
    """Ends gloo's communication before Python ends.

    A thread of gloo needs Python once more, to free the tensors of the last exchange. If Python is
    already ending, this aborts a process whose work is done ("terminate called without an active
    exception"). Leaving the group waits for these threads only if nothing else holds it, and a
    DistributedDataParallel that has run does so forever; hence the pause, in which they get
    Python's lock.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
        time.sleep(0.1)


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
