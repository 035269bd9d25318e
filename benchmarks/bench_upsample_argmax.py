"""Speed of upsample + argmax: ``python -m benchmarks.bench_upsample_argmax [--quick]``.

reference  the specification: the upsampled logits in memory, in float32
eager      ``F.interpolate(logits.float(), ...).argmax(1)``
ours       ``mcibi_fast.ops.upsample_argmax`` and, for the counts, ``upsample_confusion``

Ours interpolates only the classes that can win between four neighbours, so its time depends on the
logits: "smooth" ones are like those of a network, which are similar over regions; in "noise"
neighbours have nothing in common, and half of the classes can win.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import mcibi_fast
from benchmarks.bench_upsample_cross_entropy import SCALE, label_map
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


def logits_of(
    kind: str, K: int, size: int, dtype: torch.dtype, device: str, batch: int = 1
) -> Tensor:
    """Multiples of 1/64: interpolating them by 8 needs no rounding, so all candidates agree."""
    logits = 3 * randn(batch, K, size, size, device=device)
    if kind == "smooth":
        regions = 5 * randn(batch, K, size // 8, size // 8, device=device)
        logits = F.interpolate(regions, (size, size), mode="bicubic") + 0.1 * logits
    return ((64 * logits).round() / 64).to(dtype)


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    return F.interpolate(logits.float(), labels.shape[1:], mode="bilinear").argmax(1)


def eager_counts(logits: Tensor, labels: Tensor) -> Tensor:
    K, valid = logits.shape[1], labels != 255
    pairs = labels[valid] * K + eager(logits, labels)[valid]
    return torch.bincount(pairs, minlength=K * K).view(K, K)


def argmax(logits: Tensor, labels: Tensor) -> Tensor:
    return ops.upsample_argmax(logits, (labels.shape[1], labels.shape[2]))


def counts(logits: Tensor, labels: Tensor) -> Tensor:
    return ops.upsample_confusion(logits, labels, logits.shape[1])


def by_reference(form: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    with mcibi_fast.backend("reference"):
        return form(logits, labels)


def case(
    K: int,
    size: int,
    kind: str,
    result: str,
    dtype: torch.dtype,
    device: str,
    batch: int = 1,
) -> Case:
    logits = logits_of(kind, K, size, dtype, device, batch)
    labels = label_map(K, SCALE * size, device).repeat(batch, 1, 1)
    counting = result == "counts"
    ours, theirs = (counts, eager_counts) if counting else (argmax, eager)
    forms = {
        "reference": functools.partial(by_reference, ours),
        "eager": theirs,
        "ours": ours,
    }
    candidates = []
    for name, form in forms.items():
        backend = backend_of("upsample_argmax", logits, labels.shape[1:]) if name == "ours" else ""
        candidates.append(Candidate(name, functools.partial(form, logits, labels), backend))
    return Case(
        "upsample_argmax",
        {
            "K": K,
            **batch_column(batch),
            "map": size,
            "labels": SCALE * size,
            "logits": kind,
            "result": result,
        },
        dtype,
        candidates,
        bytes=nbytes(logits) + nbytes(labels),
        flops=0,  # almost all of the interpolation can be avoided
    )


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    sizes = [(8, 64), (1, 128)] if device == "cuda" else [(1, 64), (1, 128)]
    for dtype in dtypes(device):
        for batch, size in [(1, 64)] if quick else sizes:
            for K in (19, 60, 150):
                for kind in ("smooth", "noise"):
                    for result in ("labels", "counts"):
                        yield functools.partial(case, K, size, kind, result, dtype, device, batch)


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``."""
    return [run_cases("upsample_argmax", cases(device, quick), device, quick)]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))
