"""How many threads a training process takes."""

from __future__ import annotations

import os

import torch


def leave_cores_to_loaders(workers: int) -> None:
    """Lets PyTorch use the cores that loader processes leave.

    With one thread more than there are cores, OpenMP's barriers wait and training is much slower.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (cores or 1) - workers)))
