"""One of two ranks: two steps of a context under DistributedDataParallel, of two micro-batches."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mcibi_fast.training.processes import leave_group
from tests.nn.test_observing import batch, build, loss_of, sgd, state

if __name__ == "__main__":
    rank, world, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{out / 'store'}", rank=rank, world_size=2)
    found = []
    for name in ("paper", "representations"):
        context = build(name)
        model = DistributedDataParallel(context, find_unused_parameters=True)
        optimizer = sgd(model)
        for step in range(2):
            for part in range(2):
                with model.no_sync() if part == 0 else nullcontext():
                    loss_of(model, *batch(4 * step + 2 * part + rank)).backward()
            optimizer.step()
        found.append(state(context.memory))
    torch.save(found, out / f"{rank}.pt")
    leave_group()
