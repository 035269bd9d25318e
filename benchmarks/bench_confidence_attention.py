"""Speed of the attention: ``python -m benchmarks.bench_confidence_attention [--quick]``.

reference  the specification: scores, softmax and product, all in memory, in float32
eager      the same in the dtype of the inputs
sdpa       torch.nn.functional.scaled_dot_product_attention with the kernel that it chooses
flash, efficient, cudnn   on a GPU each of its kernels that can run, separately
ours       ``mcibi_fast.ops.confidence_attention``; on the CPU it is sdpa

The layout is "rows", a contiguous (B, N, D) tensor as the modules make it by copying their maps, or
"maps", a view of a (B, D, h, w) map.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query.shape[2] ** -0.5 * query @ key.mT, -1) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v).squeeze(1)


def peers(device: str, inputs: list[Tensor]) -> dict[str, Callable[..., Tensor]]:
    """Each of SDPA's fused kernels that accepts these inputs."""
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    found = {}
    for name, kernel in kernels.items() if device == "cuda" else ():

        def forced(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend = kernel) -> Tensor:
            with sdpa_kernel(kernel):
                return sdpa(q, k, v)

        leaves = [t.detach().requires_grad_() for t in inputs]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they say why a kernel cannot run
            try:
                result = forced(*leaves)
                torch.autograd.grad(result, leaves, torch.ones_like(result))
            except RuntimeError:
                continue
        found[name] = forced
    return found


def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with mcibi_fast.backend("reference"):
        return ops.confidence_attention(query, key, value)


def gradient(forward: Callable[..., Tensor], *inputs: Tensor, grad: Tensor) -> Tensor:
    """The gradients of query, key and value side by side, by a forward and a backward."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    return torch.cat(torch.autograd.grad(forward(*leaves), leaves, grad), -1)


def case(
    size: int,
    width: int,
    direction: str,
    dtype: torch.dtype,
    device: str,
    layout: str = "rows",
    batch: int = 1,
) -> Case:
    N = size * size
    inputs = [randn(batch, N + i, width, device=device, dtype=dtype)[:, i:] for i in range(3)]
    if layout == "maps":
        inputs = [t.mT.contiguous().mT for t in inputs]
    forms = {"reference": reference, "eager": eager, "sdpa": sdpa, **peers(device, inputs)}
    forms["ours"] = ops.confidence_attention
    if direction == "forward":
        runs = {name: functools.partial(f, *inputs) for name, f in forms.items()}
    else:
        grad = randn(batch, N + 3, width, device=device, dtype=dtype)[:, 3:]
        runs = {
            name: functools.partial(gradient, f, *inputs, grad=grad) for name, f in forms.items()
        }
    backend = backend_of("confidence_attention", *inputs)
    both = direction != "forward"
    return Case(
        "confidence_attention",
        {
            **batch_column(batch),
            **{"N": N, "D": width, "map": size, "layout": layout, "direction": direction},
        },
        dtype,
        [Candidate(n, r, backend if n == "ours" else "") for n, r in runs.items()],
        bytes=nbytes(*inputs) // 3 * (12 if both else 4),
        flops=(14 if both else 4) * batch * N * N * width,
    )


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    sizes = [(8, 64), (1, 128)] if device == "cuda" else [(1, 64), (1, 128)]
    kinds = (
        [("rows", 256), ("maps", 256)] if quick else [("rows", 256), ("maps", 256), ("rows", 512)]
    )
    for layout, width in kinds:
        for dtype in dtypes(device)[:2]:  # on a GPU bfloat16 and float32
            for batch, size in [(1, 64)] if quick else sizes:
                for direction in ("forward",) if quick else ("forward", "forward+backward"):
                    if device == "cpu" and (size, direction) == (128, "forward+backward"):
                        continue  # a call takes half a minute
                    yield functools.partial(
                        case, size, width, direction, dtype, device, layout, batch
                    )
    # Inference of one image: fewer tiles of rows than a GPU has multiprocessors.
    for width, size in product((256, 512), (64, 32)) if device == "cuda" else ():
        yield functools.partial(case, size, width, "forward", torch.bfloat16, device)


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``."""
    return [run_cases("confidence_attention", cases(device, quick), device, quick)]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))
