"""Other libraries' models before and after `accelerate`: ``mcibi-fast bench dropin``.

The models of `dropin_models` are built from their configurations, with random weights; the image is
512x512. A case is a library, a model, the number of classes K and a task:

train       the loss as the library computes it and the gradients of all weights, batch
            normalisation and dropout as in evaluation
inference   from the image to the class of every pixel, by the library's own way to it

library     the library's model
ours        the same, accelerated by ``compat.<library>.accelerate``

Before a case is timed, the loss, the gradients and the classes of both are compared; the column
"difference" is the largest difference divided by the largest value, and for classes the share that
differs. The allocator is glibc's as it is, since that is what others' programs have: it returns
large results to the system, so their pages are new in every step. A library that is not installed
is left out, and named. All cases take hours on a slow
machine: ``--resume`` writes each as it comes and continues where it was stopped, ``--only
"transformers UperNet 150"`` selects some.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Candidate, Case
from benchmarks.dropin_models import IGNORED, MODELS, Task
from benchmarks.harness import Later, command_line, nbytes, randn, run_cases
from benchmarks.results import Result


def accelerated(library: str, model: nn.Module) -> nn.Module:
    """A copy that is accelerated, and its image processor if it has one."""
    own = importlib.import_module(f"mcibi_fast.compat.{library}")
    fast = copy.deepcopy(model)
    if list(model.parameters()):
        own.accelerate(fast)
    if hasattr(model, "processor"):
        object.__setattr__(fast, "processor", own.accelerate(copy.deepcopy(model.processor)))
    return fast


@torch.no_grad()
def set_statistics(task: Task, x: Tensor, y: Tensor) -> None:
    """Gives batch normalisation the statistics of its inputs, as a trained model has them.

    With those of a new model, means of 0 and variances of 1, MobileViT's random weights shrink the
    logits to 1e-43, which no two computations agree on.
    """
    norms = [m for m in task.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of this pass alone
    with torch.random.fork_rng(devices=[]):  # dropout draws
        task.loss(task.model.train(), torch.cat([x, x.flip(3)]), torch.cat([y, y.flip(2)]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def train(task: Task, x: Tensor, y: Tensor, model: Any) -> list[Tensor]:
    loss = task.loss(model, x, y)
    # Gradients of some biases are zero up to rounding (a softmax or a batch norm cancels them).
    used = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    gradients = torch.autograd.grad(loss, used, allow_unused=True)
    return [loss.detach(), *(g for g in gradients if g is not None)]


def infer(task: Task, x: Tensor, _y: Tensor, model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [task.classes(model, x)]


class Kept:
    """A function that keeps its last result, so that it need not run again to be compared."""

    def __init__(self, run: Callable[[], list[Tensor]]) -> None:
        self.run = run
        self.result: list[Tensor] = []

    def __call__(self) -> list[Tensor]:
        self.result = []  # freed before, so that the peak of memory is that of one run
        self.result = self.run()
        return self.result


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference of the results, as the module's docstring has it."""
    largest = 0.0
    for a, b in zip(after, before, strict=True):
        if not b.is_floating_point():
            return float((a != b).double().mean())
        largest = max(largest, float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return largest


def case(
    library: str, kind: str, make: Callable[[str, int, int], Task],
    K: int, size: int, direction: str, device: str,
) -> Case:  # fmt: skip
    task = make(kind, K, size)
    slow = task.model.to(device)
    x = randn(1, 3, size, size, device=device)
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, K, (1, size // 8, size // 8), generator=generator)
    y = y.repeat_interleave(8, 1).repeat_interleave(8, 2).to(device)
    y[:, :8] = IGNORED
    set_statistics(task, x, y)
    fast = accelerated(library, slow.eval())
    run = train if direction == "train" else infer
    before, after = (Kept(functools.partial(run, task, x, y, model)) for model in (slow, fast))
    return Case(
        "dropin",
        sizes_of(library, kind, K, size, direction),
        torch.float32,
        [
            Candidate("library", before),
            Candidate(
                "ours",
                after,
                counts=lambda: {"difference": difference(before.result, after.result)},
            ),
        ],
        bytes=nbytes(x, *slow.parameters()),
        flops=0,  # not counted: the model's, which are the same in both
        tolerance=1e-3,
        euclidean=True,
    )


def sizes_of(library: str, kind: str, K: int, size: int, direction: str) -> dict[str, Any]:
    return {"library": library, "model": kind, "K": K, "size": size, "task": direction}


def cases(device: str, quick: bool) -> Iterator[Later]:
    size = 64 if quick else 512
    for K in (19,) if quick else (150, 19):
        for library, package, kinds, make, directions in MODELS:
            if importlib.util.find_spec(package) is None:
                print(f"{library}: left out, {package} is not installed")
                continue
            for kind in kinds[:2] if quick else kinds:
                for direction in directions:
                    sizes = library, kind, K, size, direction
                    made = functools.partial(
                        case, library, kind, make, K, size, direction, device
                    )  # fmt: skip
                    yield Later(sizes_of(*sizes), made)


def run(device: str = "cpu", quick: bool = False) -> list[Result]:
    """The result of ``harness.run_cases``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        return [run_cases("dropin", cases(device, quick), device, quick, keep_memory=False)]


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__.splitlines()[0]))
