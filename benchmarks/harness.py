"""What the benchmarks share: checks that results agree, times, memory, the machine's limits.

A benchmark is a list of cases; a case has several ways to compute the same thing, the candidates.
Before a case is timed, the outputs of all candidates are compared; if one disagrees, nothing is
reported. Timings are interleaved (every candidate once per round, in rotating order) and their
medians are reported, so that a machine that is busy for a while slows down all of them. Each time
is also given as a share of the limit: the time that copying the inputs and outputs, or the
multiplications, would take at the rates of PyTorch's own copy and matrix product, measured in the
same run. A candidate whose data stay in a cache, or which multiplies faster than PyTorch does, can
exceed 100 %.

Clocks, memory and limits are in `benchmarks.machine`, the format of the results in
`benchmarks.results`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mcibi_fast
from benchmarks.machine import interleaved, keep_freed_memory, limits, peak_extra_memory
from benchmarks.results import RESULTS, Result, Row, case_table, result_of, write

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


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    Args:
        name: "reference", "eager", "compile", "sdpa" or "ours"; all are compared with the first
            candidate of a case.
        run: computes the output, one tensor or several, from inputs that it holds.
        backend: the backend of this package that runs.
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
        return f"{self.op}: {sizes}, {_name(self.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_cases(
    benchmark: str, cases: Iterable[Callable[[], Case]], device: str, quick: bool
) -> Result:
    """Checks and measures the cases one after another, printing each.

    Args:
        benchmark: name of the benchmark, for the result.
        cases: functions that make a case, so that only one case is in memory at a time.
        device: "cpu" or "cuda".
        quick: run fewer rounds.

    Returns:
        Rows, limits, the number of cases that ``stop_after`` left out, and the failures after which
        ``survive_failures`` let it continue.

    Raises:
        Disagreement: a candidate's result differs from the reference's.
    """
    if device == "cpu":
        keep_freed_memory()
    result = result_of(benchmark, device)
    where = result["environment"]
    print(f"{benchmark} on {where['device']}, {where['threads']} threads")
    for make in cases:
        if time.monotonic() > _deadline:
            result["cases_left_out"] += 1
            continue
        try:
            _add_case(result, make(), device, quick)
        except Exception as error:
            if not _survive:
                raise
            result["failures"].append(f"{type(error).__name__}: {error}"[:1000])
            print(f"\nFAILED {result['failures'][-1]}", flush=True)
        if _folder is not None:
            write(result, _folder)
    return result


def _add_case(result: Result, case: Case, device: str, quick: bool) -> None:
    """Checks, measures and prints one case."""
    check(case)
    dtype = _name(case.dtype)
    if dtype not in result["limits"]:
        result["limits"][dtype] = limits(device, case.dtype, quick)
    rows = measure(case, device, result["limits"][dtype], quick)
    result["keys"] = list(dict.fromkeys([*result["keys"], *case.sizes, "dtype"]))
    result["rows"] += rows
    print(f"\n{case}\n{case_table(rows)}", flush=True)


_deadline = float("inf")
_survive = False
_folder: Path | None = None


def stop_after(seconds: float) -> None:
    """Makes ``run_cases`` begin no further case once this many seconds from now have passed."""
    global _deadline
    _deadline = time.monotonic() + seconds


def survive_failures(folder: Path | None = None) -> None:
    """Makes ``run_cases`` list a case that fails, without figures, and continue.

    Args:
        folder: folder for the result, written after each case in case the process is stopped.
    """
    global _survive, _folder
    _survive, _folder = True, folder


# ---- agreement ---------------------------------------------------------------


@torch.no_grad()
def check(case: Case) -> None:
    """Compares all outputs with the first candidate's, or with the truth if the case has one.

    Raises:
        Disagreement: one differs by more than the rounding of the dtype explains.
    """
    first, *others = case.candidates
    expected = _results(first.run)
    truth = None if case.truth is None else _results(case.truth)
    for other in others:
        results = _results(other.run)
        shapes, right = ([tuple(t.shape) for t in ts] for ts in (results, expected))
        if shapes != right:
            raise Disagreement(
                f"{case}: {other.name} gave {_join(shapes)}, not the shape of {first.name}, "
                f"{_join(right)}"
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
                    f"{case}: {other.name} is {error:.2g} away from {first.name}{what}, "
                    f"more than {bar:.2g}"
                )


def _results(run: Callable[[], Output]) -> list[Tensor]:
    with torch.enable_grad():
        result = run()
    return [result] if isinstance(result, Tensor) else list(result)


def _largest(result: Tensor, expected: Tensor) -> float:
    """Largest error divided by the largest value; for integers the share that differs."""
    if not expected.is_floating_point():
        return float((result != expected).double().mean())
    expected = expected.double()
    return float((result.double() - expected).abs().max() / expected.abs().max())


def _relative(result: Tensor, truth: Tensor) -> float:
    """Relative error in the Euclidean norm; for integers the share that differs."""
    if not truth.is_floating_point():
        return float((result != truth).double().mean())
    truth = truth.double()
    return float((result.double() - truth).norm() / truth.norm())


def _join(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


# ---- time and memory ---------------------------------------------------------


def measure(case: Case, device: str, rates: dict[str, float], quick: bool) -> list[Row]:
    """Times and peak memory of every part and candidate of a case, as rows of the result."""
    timed = [*case.parts, *case.candidates]
    budget = 3 if quick or device == "cuda" else 20
    seconds = interleaved([c.run for c in timed], device, budget)
    ours = statistics.median(seconds[-1])
    copy, matmul = case.bytes / rates["copy_GB_s"] / 1e9, case.flops / rates["matmul_GFLOP_s"] / 1e9
    rows = []
    for i, (candidate, times) in enumerate(zip(timed, seconds, strict=True)):
        median, ordered = statistics.median(times), sorted(times)
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        rows.append(
            {
                **case.sizes,
                "dtype": _name(case.dtype),
                "candidate": candidate.name,
                "backend": candidate.backend,
                "median_ms": 1e3 * median,
                "fastest_ms": 1e3 * ordered[0],
                "spread": f"{1e3 * low:.3g}-{1e3 * high:.3g}",
                "calls": len(times),
                "times_ours": median / ours,
                "extra_MiB": peak_extra_memory(candidate.run, device),
                "bytes": case.bytes,
                "flops": case.flops,
                "limit_ms": 1e3 * max(copy, matmul),
                "limited_by": "copy" if copy >= matmul else "matmul",
                "share_of_limit": None if i < len(case.parts) else max(copy, matmul) / median,
                **(candidate.counts() if candidate.counts else {}),
            }
        )
    return rows


def command_line(run: Callable[[str, bool], list[Result]], description: str) -> int:
    """The ``main`` of a benchmark: parses the options, runs it and writes the results."""
    parser = argparse.ArgumentParser(description=description)
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_cuda else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes only, fewer rounds")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--seconds", type=float, help="begin no case after this time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for CSV and JSON")
    options = parser.parse_args()
    if options.device == "cuda" and not has_cuda:
        parser.error("--device cuda: no CUDA device is visible")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads: must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.seconds is not None:
        stop_after(options.seconds)
    try:
        write_all(run(options.device, options.quick), options.out)
    except Disagreement as error:
        print(f"nothing to report: {error}", file=sys.stderr)
        return 1
    return 0


def write_all(results: Iterable[Result], folder: Path) -> None:
    """Writes the results and prints where they are."""
    for result in results:
        print(f"\nwrote {write(result, folder)} and .csv")


# ---- what the benchmarks make their cases from -------------------------------


def dtypes(device: str) -> list[torch.dtype]:
    """The dtypes to time: on the CPU only float32."""
    return [torch.bfloat16, torch.float32, torch.float16] if device == "cuda" else [torch.float32]


def randn(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed numbers, the same in every run on the same kind of device."""
    g = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=g, device=device).to(dtype)


def seeded(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls a constructor with PyTorch's global generator seeded, which is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **options)


def nbytes(*tensors: Tensor) -> int:
    """Total number of bytes of the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def backend_of(op: str, *inputs: Any, **options: Any) -> str:
    """The backend of this package that runs a call."""
    return mcibi_fast.explain(op, *inputs, **options).splitlines()[0].partition(": ")[2]
