"""One of two ranks that train models of other libraries with a memory."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mcibi_fast.training.processes import leave_group
from tests.compat.test_memory_distributed import CASES, trained

if __name__ == "__main__":
    rank, out = int(sys.argv[1]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{out / 'store'}", rank=rank, world_size=2)
    torch.save([trained(case, rank) for case in CASES], out / f"{rank}.pt")
    leave_group()
