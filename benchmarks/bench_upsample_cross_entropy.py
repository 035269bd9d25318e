"""Speed of upsample + cross entropy: ``python -m benchmarks.bench_upsample_cross_entropy``.

reference  the specification: upsampled logits and their softmax in memory, in float32
eager      the same in the dtype of the logits: ``F.cross_entropy(F.interpolate(logits, ...), ...)``
two_passes ours on CUDA with the backward as a pass of its own, which forms the softmax again
ours       ``mcibi_fast.ops.upsample_cross_entropy``
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
from benchmarks.harness import (
    backend_of,
    batch_column,
    command_line,
    dtypes,
    nbytes,
    randn,
    run_cases,
)
from benchmarks.results import Result
from mcibi_fast import ops

SCALE = 8  # output stride


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    upsampled = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    return F.cross_entropy(upsampled, labels, ignore_index=255).float()


def reference(logits: Tensor, labels: Tensor) -> Tensor:
    with mcibi_fast.backend("reference"):
        return ops.upsample_cross_entropy(logits, labels)


def two_passes(logits: Tensor, labels: Tensor) -> Tensor:
    losses = ops.upsample_cross_entropy(logits, labels, reduction="none")
    return losses.sum() / (labels != 255).sum()


def gradient(forward: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(forward(leaf, labels), leaf)[0]


def label_map(K: int, size: int, device: str) -> Tensor:
    """Labels in regions of 16 x 16 pixels, a tenth of which are ignored."""
    g = torch.Generator().manual_seed(K)
    coarse = torch.randint(0, K, (1, 1, size // 16, size // 16), generator=g).float()
    coarse[torch.rand(coarse.shape, generator=g) < 0.1] = 255
    return F.interpolate(coarse, (size, size)).squeeze(1).long().to(device)


def case(
    K: int, size: int, direction: str, dtype: torch.dtype, device: str, batch: int = 1
) -> Case:
    logits = 3 * randn(batch, K, size, size, device=device, dtype=dtype)
    labels = label_map(K, SCALE * size, device).repeat(batch, 1, 1)
    both = direction != "forward"
    forms = {"reference": reference, "eager": eager, "two_passes": two_passes}
    if device == "cpu" or not both:
        del forms["two_passes"]
    forms["ours"] = ops.upsample_cross_entropy
    runs = {
        name: functools.partial(gradient, form, logits, labels)
        if both
        else functools.partial(form, logits, labels)
        for name, form in forms.items()
    }
    backend = backend_of("upsample_cross_entropy", logits, labels)
    upsampled = logits.numel() * SCALE**2
    return Case(
        "upsample_cross_entropy",
        {
            "K": K,
            **batch_column(batch),
            "map": size,
            "labels": SCALE * size,
            "direction": direction,
        },
        dtype,
        [Candidate(n, r, backend if n in ("two_passes", "ours") else "") for n, r in runs.items()],
        bytes=(3 if both else 1) * nbytes(logits) + (2 if both else 1) * nbytes(labels),
        # Interpolation along the rows, exp and sum; the backward does the same, and the adjoint.
        flops=(14 if both else 5) * upsampled,
    )


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    sizes = [(8, 64), (1, 128)] if device == "cuda" else [(1, 64), (1, 128)]
    for dtype in dtypes(device):
        for batch, size in [(1, 64)] if quick else sizes:
            for K in (19, 60, 150):
                for direction in ("forward", "forward+backward"):
                    yield functools.partial(case, K, size, direction, dtype, device, batch)


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``."""
    return [run_cases("upsample_cross_entropy", cases(device, quick), device, quick)]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))
