"""One of two processes that train an accelerated model: ``dropin_worker STORE RANK``."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mcibi_fast.compat import torchvision as library
from mcibi_fast.training.processes import leave_group
from tests.compat import dropin
from tests.compat.test_dropin_torchvision import build


def main(store: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(rank)
    x, y = dropin.images(generator), dropin.labels(generator)

    def loss_of(model: nn.Module) -> Tensor:
        return sum(F.cross_entropy(out, y, ignore_index=255) for out in model(x).values())

    options: list[dict[str, Any]] = [{}, {"find_unused_parameters": True}, {"static_graph": True}]
    for each in options:
        slow, fast = (
            DistributedDataParallel(dropin.without_dropout(build("fcn")).double(), **each)
            for _ in range(2)
        )
        library.accelerate(fast)
        for _ in range(2):  # a static graph is recorded in the first step
            dropin.assert_close(dropin.step(fast, loss_of), dropin.step(slow, loss_of))
        print("agreed", flush=True)
    leave_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
