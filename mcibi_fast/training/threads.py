"""How many threads a training process takes."""

from __future__ import annotations

import torch

from mcibi_fast.data.loading import usable_cores


def leave_cores_to_loaders(workers: int) -> None:
    """Lets PyTorch use the cores that loader processes leave.

    With one thread more than there are cores, OpenMP's barriers wait and training is much slower.
    """
    torch.set_num_threads(max(1, min(torch.get_num_threads(), usable_cores() - workers)))
