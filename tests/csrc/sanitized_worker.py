"""Runs the table of all ops on a build of the CPU kernels with sanitizers, which end the process at
the first wrong access: ``python -m tests.csrc.sanitized_worker LIBRARY`` with libasan preloaded.
"""

from __future__ import annotations

import sys

import torch

from tests.csrc.in_place import load_in_place


def run() -> int:
    """Every case of the table with a CPU kernel, in all dtypes and layouts; returns the number."""
    import mcibi_fast
    from mcibi_fast.ops.dispatch import _ops
    from tests.ops.table import CASES, HARD

    count = 0
    for case in (*CASES, HARD):
        if all(kernel.backend != "cpu" for kernel in _ops[case.name].kernels):
            continue
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for layout in ("contiguous", "channels_last", "strided"):
                args = case.args(dtype, layout)
                leaves = [args[i].requires_grad_() for i in case.differentiable]
                with mcibi_fast.backend("cpu"):
                    result = case.call(*args)
                    if leaves:
                        torch.autograd.grad(result, leaves, torch.ones_like(result))
                count += 1
    return count + _maps_larger_than_the_labels()


def _maps_larger_than_the_labels() -> int:
    from mcibi_fast import ops

    g, count = torch.Generator().manual_seed(0), 0
    for classes, dtype in ((2, torch.float32), (19, torch.bfloat16), (40, torch.float64)):
        for layout in (torch.contiguous_format, torch.channels_last):
            for size in ((10, 6), (23, 35)):
                logits = torch.randn(2, classes, *size, generator=g).to(dtype)
                logits = logits.contiguous(memory_format=layout).requires_grad_()
                labels = torch.randint(0, classes, (2, 5, 3), generator=g)
                ops.upsample_cross_entropy(logits, labels).backward()
                count += 1
    return count


if __name__ == "__main__":
    torch.set_num_threads(2)
    load_in_place(sys.argv[1], "_cpu.so")
    print(f"{run()} cases")
