"""What a benchmark measures: cases, their candidates, and the check that these agree.

A case has several ways to compute the same thing, the candidates. Before it is timed, the outputs
of all candidates are compared; if one disagrees, nothing is reported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import mcibi_fast

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}
NEAR_TIES = 1e-3  # share of integers that may differ, as rounding decides an argmax near a tie
Output = Tensor | Sequence[Tensor]


class Disagreement(RuntimeError):
    """Two candidates computed different things, so there is no speed to report."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    Args:
        name: "reference", "eager", "compile", "sdpa" or "ours"; all are compared with the first
            candidate of a case.
        run: computes the output, one tensor or several, from inputs that it holds.
        backend: the backend of this package that runs; "" where none does.
        counts: computes further columns of the results, once and outside the timing.
    """

    name: str
    run: Callable[[], Output]
    backend: str = ""
    counts: Callable[[], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Case:
    """One size, dtype and direction of an op.

    Args:
        op: the op's name.
        sizes: what distinguishes the cases of the op, as columns of the results.
        dtype: dtype of the inputs.
        candidates: the reference first, ours last.
        bytes: bytes of the inputs that must be read and of the outputs that must be written, once
            each.
        flops: number of multiplications and additions that cannot be avoided.
        parts: what all candidates contain (convolutions), timed in the same rounds as a bound;
            their outputs are not compared.
        tolerance: the largest allowed error of an output compared with the first candidate's, as a
            share of the largest value. The default depends on the dtype.
        euclidean: measure the error in the Euclidean norm instead. This is for gradients through a
            ReLU: where its input is zero up to rounding, one candidate passes the gradient on and
            another does not, which changes a few entries completely but hardly the norm.
        truth: computes the output in higher precision. If it is given, an output is right if its
            error is at most twice that of the first candidate, as in the tests.
    """

    op: str
    sizes: dict[str, Any]
    dtype: torch.dtype
    candidates: list[Candidate]
    bytes: int
    flops: int
    parts: list[Candidate] = field(default_factory=list)
    tolerance: float | None = None
    euclidean: bool = False
    truth: Callable[[], Output] | None = None

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {value}" for name, value in self.sizes.items())
        return f"{self.op}: {sizes}, {dtype_name(self.dtype)}"


@torch.no_grad()
def check(case: Case, failed: dict[str, Exception] | None = None) -> None:
    """Compares all outputs with the first candidate's, or with the truth if the case has one.

    Args:
        case: whose candidates to run.
        failed: takes the errors by the candidates' names, instead of raising the first one. The
            first candidate that runs is then the one that the others are compared with.

    Raises:
        Disagreement: one differs by more than the rounding of the dtype explains.
    """
    first: tuple[str, list[Tensor]] | None = None
    truth = None if case.truth is None else results_of(case.truth)
    for candidate in case.candidates:
        try:
            results = results_of(candidate.run)
            if first is None:
                first = candidate.name, results
            else:
                compare(case, candidate.name, results, first, truth)
        except Exception as error:
            if failed is None:
                raise
            failed[candidate.name] = error


def compare(
    case: Case,
    name: str,
    results: list[Tensor],
    first: tuple[str, list[Tensor]],
    truth: list[Tensor] | None,
) -> None:
    """Compares one candidate's results with those of another one, or with the truth.

    Args:
        case: of the candidates.
        name: of the candidate.
        results: its results.
        first: the name and the results of the other one.
        truth: the results in higher precision, or None.

    Raises:
        Disagreement: they differ by more than the rounding of the dtype explains.
    """
    first_name, expected = first
    shapes, right = ([tuple(t.shape) for t in ts] for ts in (results, expected))
    if shapes != right:
        raise Disagreement(
            f"{case}: {name} gave {_join(shapes)}, not the shape of {first_name}, {_join(right)}"
        )
    for i, (result, e) in enumerate(zip(results, expected, strict=True)):
        if truth is None:
            error = (_relative if case.euclidean else _largest)(result, e)
            bar = case.tolerance or TOLERANCE[case.dtype]
        else:
            unit = torch.finfo(case.dtype).eps / 2
            error, bar = _relative(result, truth[i]), 2 * _relative(e, truth[i]) + unit
        if not e.is_floating_point():
            bar = max(bar, NEAR_TIES)
        if not error <= bar:
            what = f" in result {i}" if len(results) > 1 else ""
            raise Disagreement(
                f"{case}: {name} is {error:.2g} away from {first_name}{what}, more than {bar:.2g}"
            )


def results_of(run: Callable[[], Output]) -> list[Tensor]:
    """One result or several, as a list."""
    with torch.enable_grad():
        result = run()
    return [result] if isinstance(result, Tensor) else list(result)


def _largest(result: Tensor, expected: Tensor) -> float:
    """Largest error divided by the largest value; for integers the share that differs."""
    if not expected.is_floating_point():
        return float((result != expected).double().mean())
    expected = expected.double()
    return _ratio((result.double() - expected).abs().max(), expected.abs().max())


def _relative(result: Tensor, truth: Tensor) -> float:
    """Relative error in the Euclidean norm; for integers the share that differs."""
    if not truth.is_floating_point():
        return float((result != truth).double().mean())
    truth = truth.double()
    return _ratio((result.double() - truth).norm(), truth.norm())


def _ratio(error: Tensor, size: Tensor) -> float:
    """Zeros, such as the gradients of a softmax over one value, are met exactly or not at all."""
    return 0.0 if error == 0 else float(error / size)


def _join(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


@torch.no_grad()
def check_in_float64(
    name: str,
    sizes: dict[str, Any],
    module: nn.Module,
    inputs: Sequence[Tensor],
    result: Callable[[Any], Tensor] = lambda output: output,
) -> None:
    """Compares a module with itself in float64 with the ops' references.

    Args:
        name, sizes: of the case, for the message.
        module: in evaluation mode.
        inputs: what it takes, in float32.
        result: what of the module's output is compared.

    Raises:
        Disagreement: they differ by more than rounding.
    """
    exact = copy.deepcopy(module).double()

    def reference() -> Tensor:
        with mcibi_fast.backend("reference"):
            return result(exact(*(t.double() for t in inputs)))

    candidates = [
        Candidate("reference", reference),
        Candidate("ours", lambda: result(module(*inputs))),
    ]
    check(Case(name, sizes, torch.float32, candidates, bytes=0, flops=0))
