"""Speed of the memory update: ``python -m benchmarks.bench_memory_update [--quick]``.

reference  upsamples the features, then selects the pixels of each class (as the paper describes)
eager      upsamples, then adds all pixels with one index_add
adjoint    the project's method in plain PyTorch: instead of upsampling the features, it reduces the
           labels' one-hot map to their size; allocates the one-hot map
ours       ``mcibi_fast.ops.memory_update``
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import mcibi_fast
from benchmarks.cases import Candidate, Case
from benchmarks.harness import backend_of, command_line, dtypes, nbytes, randn, run_cases
from benchmarks.results import Result
from mcibi_fast import ops
from mcibi_fast.ops.memory_update.reference import moving_average

Z, IGNORE = 512, 255


def label_map(K: int, size: int, device: str) -> Tensor:
    """Blocks of classes, 2 % ignored pixels; (1, size, size) int64."""
    g = torch.Generator().manual_seed(K + size)
    coarse = torch.randint(0, K, (1, 1, 16, 16), generator=g).float()
    labels = F.interpolate(coarse, (size, size)).long().squeeze(1)
    labels[torch.rand(labels.shape, generator=g) < 0.02] = IGNORE
    return labels.to(device)


def eager(memory: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Upsamples, then adds every pixel to the sum of its class."""
    R = F.interpolate(features.float(), labels.shape[1:], mode="bilinear")
    pixels, flat = R.movedim(1, -1).flatten(0, 2), labels.flatten()
    flat = torch.where(flat == IGNORE, len(memory), flat)
    sums = pixels.new_zeros(len(memory) + 1, Z).index_add_(0, flat, pixels)
    counts = torch.bincount(flat, minlength=len(memory) + 1)
    return moving_average(memory, sums[:-1], counts[:-1], 0.1, False)


def adjoint(memory: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """A = U^T onehot(GT) by the backward of PyTorch's upsampling, then A^T R."""
    K, (B, _, h, w), (H, W) = len(memory), features.shape, labels.shape[1:]
    onehot = features.new_zeros(B, K + 1, H, W, dtype=torch.float32)
    onehot.scatter_(1, torch.where(labels == IGNORE, K, labels).unsqueeze(1), 1.0)
    A = torch.ops.aten.upsample_bilinear2d_backward(
        onehot[:, :K].contiguous(), [H, W], [B, K, h, w], False
    )
    sums = torch.einsum("bkhw,bzhw->kz", A, features.float())
    return moving_average(memory, sums, onehot[:, :K].sum((0, 2, 3)).long(), 0.1, False)


def reference(memory: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    with mcibi_fast.backend("reference"):
        return ops.memory_update(memory, features, labels)


def case(
    K: int, size: int, labels_size: int, dtype: torch.dtype, device: str, batch: int = 1
) -> Case:
    memory = torch.tensor([[0.0, 1.0]], device=device).repeat(K, 1)
    features = randn(batch, Z, size, size, device=device, dtype=dtype)
    labels = label_map(K, labels_size, device).repeat(batch, 1, 1)
    args = (memory, features, labels)
    return Case(
        "memory_update",
        {"K": K, "Z": Z, "batch": batch, "map": size, "labels": labels_size},
        dtype,
        [
            Candidate("reference", functools.partial(reference, *args)),
            Candidate("eager", functools.partial(eager, *args)),
            Candidate("adjoint", functools.partial(adjoint, *args)),
            Candidate(
                "ours",
                functools.partial(ops.memory_update, *args),
                backend_of("memory_update", *args),
            ),
        ],
        bytes=nbytes(*args[1:]),
        flops=2 * features.numel(),
    )


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    sizes = [(1, 64, 512), (1, 128, 1024)]
    if device == "cuda":
        # NOTES.md predicts the first; the second is several times a GPU's L2 cache.
        sizes = [(8, 64, 512), (32, 64, 512), (1, 128, 1024)]
    for dtype in dtypes(device):
        for batch, size, labels in [(1, 64, 512)] if quick else sizes:
            for K in (19, 150):
                yield functools.partial(case, K, size, labels, dtype, device, batch)


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``."""
    return [run_cases("memory_update", cases(device, quick), device, quick)]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))
