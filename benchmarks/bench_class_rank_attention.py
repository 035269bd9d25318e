"""Speed of class-rank attention: ``python -m benchmarks.bench_class_rank_attention [--quick]``.

reference  the specification: scores, softmax and product, all in memory, in float32
eager      the same in the dtype of the inputs
general    what the op replaces: scaled_dot_product_attention at the width of the projections, 256;
           here query and weights are padded with zeros, which does not change the result
sdpa       scaled_dot_product_attention with the weights as keys and values
ours       ``mcibi_fast.ops.class_rank_attention``

With hard weights, all candidates except ours attend to one-hot rows that are made beforehand.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from itertools import product

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

WIDTH = 256  # T
SCALE = WIDTH**-0.5


def eager(query: Tensor, weights: Tensor) -> Tensor:
    return torch.softmax(SCALE * query @ weights.mT, -1) @ weights


def sdpa(query: Tensor, weights: Tensor) -> Tensor:
    q, w = query.unsqueeze(1), weights.unsqueeze(1)
    return F.scaled_dot_product_attention(q, w, w, scale=SCALE).squeeze(1)


def reference(query: Tensor, weights: Tensor) -> Tensor:
    with mcibi_fast.backend("reference"):
        return ops.class_rank_attention(query, weights, scale=SCALE)


def gradient(
    forward: Callable[..., Tensor], query: Tensor, weights: Tensor, *, grad: Tensor, hard: bool
) -> Tensor:
    """The gradients of query and weights side by side; with hard weights only of the query."""
    leaves = [t.detach().requires_grad_() for t in (query, weights)]
    inputs = leaves[:1] if hard else leaves
    return torch.cat(torch.autograd.grad(forward(*leaves), inputs, grad), -1)


def case(
    K: int,
    size: int,
    hard: bool,
    direction: str,
    dtype: torch.dtype,
    device: str,
    batch: int = 1,
) -> Case:
    N = size * size
    query = 3 * randn(batch, N, K, device=device, dtype=dtype)
    weights = torch.softmax(3 * randn(batch, N + 1, K, device=device)[:, 1:], -1).to(dtype)
    rows = F.one_hot(weights.argmax(-1), K).to(dtype) if hard else weights
    wide = [F.pad(t, (0, WIDTH - K)) for t in (query, rows)]
    ours = functools.partial(ops.class_rank_attention, scale=SCALE, hard=hard)
    forms: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "reference": (reference, [query, rows]),
        "eager": (eager, [query, rows]),
        "general": (sdpa, wide),
        "sdpa": (sdpa, [query, rows]),
        "ours": (ours, [query, weights]),
    }
    both = direction != "forward"
    runs = {}
    for name, (form, inputs) in forms.items():
        runs[name] = functools.partial(form, *inputs)
        if both:
            grad = randn(batch, N + 2, K, device=device, dtype=dtype)[:, 2:]
            grad = F.pad(grad, (0, inputs[0].shape[2] - K))
            runs[name] = functools.partial(gradient, form, *inputs, grad=grad, hard=hard)
    runs["general"] = _classes(runs["general"], K)
    backend = backend_of("class_rank_attention", query, weights, scale=SCALE, hard=hard)
    passes = (3 if both else 1) + (2 if both and not hard else 0)
    return Case(
        "class_rank_attention",
        {
            **batch_column(batch),
            **{"N": N, "K": K, "hard": hard, "map": size, "direction": direction},
        },
        dtype,
        [Candidate(n, r, backend if n == "ours" else "") for n, r in runs.items()],
        bytes=(2 + passes) * nbytes(query),
        flops=0 if hard else (14 if both else 4) * batch * N * N * K,
    )


def _classes(wide: Callable[[], Tensor], K: int) -> Callable[[], Tensor]:
    """The first K of every WIDTH columns."""
    return lambda: wide().unflatten(-1, (-1, WIDTH))[..., :K].flatten(-2)


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    sizes = [(8, 64), (1, 128)] if device == "cuda" and not quick else [(1, 64)]
    for dtype in dtypes(device)[:2]:  # on a GPU bfloat16 and float32
        for direction in ("forward",) if quick else ("forward", "forward+backward"):
            for hard in (False, True):
                for batch, size in sizes:
                    for K in (19, 60, 150):
                        yield functools.partial(
                            case, K, size, hard, direction, dtype, device, batch
                        )
    # Inference of one image: fewer tiles of rows than a GPU has multiprocessors.
    for K, size in product((19, 150), (64, 32)) if device == "cuda" and not quick else ():
        yield functools.partial(case, K, size, False, "forward", torch.bfloat16, device)


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``."""
    return [run_cases("class_rank_attention", cases(device, quick), device, quick)]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))
