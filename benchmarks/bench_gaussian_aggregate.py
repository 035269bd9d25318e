"""Speed of the aggregation: ``python -m benchmarks.bench_gaussian_aggregate [--quick]``.

reference  the specification
eager      matmul(table.T, softmax(logits, 1).flatten(2)), the faster of the eager forms, with a
           table that is computed beforehand
compile    the same through torch.compile
ours       ``mcibi_fast.ops.gaussian_aggregate``, which computes the table from eps in every call
philox     the same, which also draws the noise
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import mcibi_fast
from benchmarks.cases import Candidate, Case
from benchmarks.harness import backend_of, command_line, dtypes, nbytes, randn, run_cases
from benchmarks.results import Result
from mcibi_fast import ops

Z = 512


def eager(logits: Tensor, table: Tensor) -> Tensor:
    return torch.matmul(table.T, torch.softmax(logits, 1).flatten(2)).unflatten(2, logits.shape[2:])


def reference(logits: Tensor, memory: Tensor, noise: Tensor) -> Tensor:
    with mcibi_fast.backend("reference"):
        return ops.gaussian_aggregate(logits, memory, Z, noise=noise)


def gradient(forward: Callable[..., Tensor], logits: Tensor, *rest: Any, grad: Tensor) -> Tensor:
    """The gradient of the logits, by a forward and a backward."""
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(forward(leaf, *rest), leaf, grad)[0]


def case(
    K: int,
    size: int,
    direction: str,
    dtype: torch.dtype,
    device: str,
    compiled: bool,
    batch: int = 1,
) -> Case:
    torch._dynamo.reset()  # each case is compiled for its own sizes
    logits = 3 * randn(batch, K, size, size, device=device, dtype=dtype)
    memory = torch.stack([randn(K, device=device), randn(K + 1, device=device)[1:].abs()], 1)
    state = torch.tensor([1, 2], device=device)
    noise = ops.gaussian_table(
        torch.tensor([[0.0, 1.0]], device=device).repeat(K, 1), Z, noise=ops.Philox(state)
    )
    table = ops.gaussian_table(memory, Z, noise=noise).to(dtype)
    ours = functools.partial(ops.gaussian_aggregate, memory=memory, channels=Z)
    forms: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
        "reference": (reference, (memory, noise)),
        "eager": (eager, (table,)),
        "compile": (torch.compile(eager, fullgraph=True), (table,)),
        "philox": (functools.partial(ours, noise=ops.Philox(state)), ()),
        "ours": (functools.partial(ours, noise=noise), ()),
    }
    if not compiled:
        del forms["compile"]
    if direction == "forward":
        runs = {name: functools.partial(f, logits, *rest) for name, (f, rest) in forms.items()}
    else:
        grad = randn(batch, Z, size, size, device=device, dtype=dtype)
        runs = {
            name: functools.partial(gradient, f, logits, *rest, grad=grad)
            for name, (f, rest) in forms.items()
        }
    backend = backend_of("gaussian_aggregate", logits, memory, Z, noise=noise)
    passes = 1 if direction == "forward" else 2
    pixels = batch * size * size
    result = Z * pixels * logits.element_size()
    return Case(
        "gaussian_aggregate",
        {"K": K, "Z": Z, "batch": batch, "map": size, "direction": direction},
        dtype,
        [Candidate(n, r, backend if n in ("ours", "philox") else "") for n, r in runs.items()],
        bytes=passes * (nbytes(logits) + result) + (passes - 1) * nbytes(logits),
        flops=passes * 2 * K * Z * pixels,
    )


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    compiled = not quick and (device == "cuda" or shutil.which("c++") is not None)
    sizes = [(1, 64), (1, 128)]
    if device == "cuda":
        # NOTES.md predicts the first; the second is several times a GPU's L2 cache.
        sizes = [(8, 64), (16, 128)]
    for dtype in dtypes(device):
        # On a GPU compiling takes longer than everything else in a case, so one dtype is enough.
        compile_too = compiled and (device == "cpu" or dtype == torch.bfloat16)
        for direction in ("forward",) if quick else ("forward", "forward+backward"):
            for batch, size in [(1, 64)] if quick else sizes:
                for K in (19, 150):
                    yield functools.partial(
                        case, K, size, direction, dtype, device, compile_too, batch
                    )


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``."""
    return [run_cases("gaussian_aggregate", cases(device, quick), device, quick)]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))
