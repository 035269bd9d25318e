"""Speed of the dataset-level context: ``python -m benchmarks.bench_context [--quick]``.

It computes C_bi from R and the logits of W (Eqs. 11-13), Z = 512, T = 256:

released   class-by-class sampling, W C_dl, materialised attention (`benchmarks.released_structure`)
general    the project's aggregation and general attention, which is what the released form runs
ours       ``nn.DatasetLevelContext.aggregate``; in the paper's form attention on the class weights

Both forms use the released noise here, so that all candidates have the same samples.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import released_structure
from benchmarks.cases import Candidate, Case
from benchmarks.harness import command_line, dtypes, nbytes, randn, run_cases, seeded
from benchmarks.results import Result
from mcibi_fast.nn import DatasetLevelContext, GaussianMemory

Z, T = 512, 256


def general(context: DatasetLevelContext, R: Tensor, logits: Tensor) -> Tensor:
    return context.attention(R, context.memory.aggregate(logits))


def ours(context: DatasetLevelContext, R: Tensor, logits: Tensor) -> Tensor:
    return context.aggregate(R, logits)


def gradient(
    form: Callable[..., Tensor], context: DatasetLevelContext, *inputs: Tensor, grad: Tensor
) -> list[Tensor]:
    """The gradients of R, the logits and the projections' weights."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    weights = [p for p in context.attention.parameters() if p.ndim > 1]
    return list(torch.autograd.grad(form(context, *leaves), [*leaves, *weights], grad))


def make_context(K: int, form: Any, dtype: torch.dtype, device: str) -> DatasetLevelContext:
    """A context in evaluation mode, whose memory holds different values for each class."""
    memory = GaussianMemory(K, Z, form=form, noise="released")
    context = seeded(DatasetLevelContext, memory, transform_channels=T, projections=form)
    memory.memory[:, 0] = randn(K, device="cpu")
    memory.memory[:, 1] = randn(K + 1, device="cpu")[1:].abs()
    return context.to(device, dtype).eval()


def case(K: int, size: int, form: str, direction: str, dtype: torch.dtype, device: str) -> Case:
    context = make_context(K, form, dtype, device)
    R = randn(1, Z, size, size, device=device, dtype=dtype).relu()
    logits = 3 * randn(1, K, size, size, device=device, dtype=dtype)
    forms = {"released": released_structure.aggregate, "general": general, "ours": ours}
    if form == "released":
        del forms["general"]  # in this form ours is the same
    both = direction != "forward"
    runs: dict[str, Callable[[], Any]] = {}
    for name, f in forms.items():
        runs[name] = torch.no_grad()(functools.partial(f, context, R, logits))
        if both:
            grad = randn(1, Z, size, size, device=device, dtype=dtype)
            runs[name] = functools.partial(gradient, f, context, R, logits, grad=grad)
    N, passes = size * size, 3 if both else 1
    if form == "paper":
        flops = 4 * N * K * (Z + N)  # R onto K channels, the attention on W, K channels onto Z
    else:
        flops = 2 * N * (K * Z + 3 * Z * T + 2 * T * T + T * Z + 2 * N * T)
    return Case(
        "context",
        {"form": form, "K": K, "map": size, "direction": direction},
        dtype,
        [Candidate(name, run) for name, run in runs.items()],
        bytes=passes * (2 * nbytes(R) + nbytes(logits)),
        flops=passes * flops,
        # A ReLU's input near zero makes gradients differ; tests/benchmarks compares in float64.
        tolerance=1e-2 if both else None,
        euclidean=both,
        truth=None if dtype == torch.float32 else _truth(K, form, both, R, logits, context),
    )


def _truth(
    K: int, form: str, both: bool, R: Tensor, logits: Tensor, context: DatasetLevelContext
) -> Callable[[], Any]:
    """The released structure in float32 on the same values."""
    wide = make_context(K, form, torch.float32, str(R.device))
    wide.load_state_dict(context.state_dict())
    inputs = [R.float(), logits.float()]
    if not both:
        return torch.no_grad()(functools.partial(released_structure.aggregate, wide, *inputs))
    grad = randn(*R.shape, device=str(R.device), dtype=R.dtype).float()
    return functools.partial(gradient, released_structure.aggregate, wide, *inputs, grad=grad)


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    for dtype in dtypes(device)[:2]:  # on a GPU bfloat16 and float32
        for size in (64,) if quick or device == "cpu" else (64, 128):
            for form in ("paper",) if quick else ("paper", "released"):
                for K in (19, 150):
                    for direction in ("forward",) if quick else ("forward", "forward+backward"):
                        yield functools.partial(case, K, size, form, direction, dtype, device)


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``."""
    return [run_cases("context", cases(device, quick), device, quick)]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))
