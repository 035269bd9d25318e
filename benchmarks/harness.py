"""What the benchmarks share: times, memory, the machine's limits, options and results.

A benchmark is a list of cases, see `benchmarks.cases`. Timings are interleaved (every candidate
once per round, in rotating order) and their medians are reported, so that a machine that is busy
for a while slows down all of them. Each time is also given as a share of the limit: the time that
copying the inputs and outputs, or the multiplications, would take at the rates of PyTorch's own
copy and matrix product, measured in the same run. A candidate whose data stay in a cache, or
which multiplies faster than PyTorch does, can exceed 100 %.

On a GPU, calls that take less time there than on the host are also timed as CUDA graphs, see
`benchmarks.graphs`.

Clocks, memory and limits are in `benchmarks.machine`, the format of the results in
`benchmarks.results`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mcibi_fast
from benchmarks import graphs
from benchmarks.cases import Case, Disagreement, check, dtype_name
from benchmarks.machine import (
    count_processor_time,
    host_seconds,
    interleaved,
    keep_freed_memory,
    limits,
    peak_extra_memory,
)
from benchmarks.options import parsed, parser_of
from benchmarks.results import Result, Row, case_table, result_of, resume, write


@dataclass(frozen=True, eq=False)  # hashed by identity, as functions are: `sizes` has no hash
class Later:
    """A case that is made when its turn comes, but whose sizes are known before."""

    sizes: dict[str, Any]
    make: Callable[[], Case]

    def __call__(self) -> Case:
        return self.make()


def run_cases(
    benchmark: str,
    cases: Iterable[Callable[[], Case]],
    device: str,
    quick: bool,
    *,
    keep_memory: bool = True,
) -> Result:
    """Checks and measures the cases one after another, printing each.

    Args:
        benchmark: name of the benchmark, for the result.
        cases: functions that make a case, so that only one case is in memory at a time.
        device: "cpu" or "cuda".
        quick: run fewer rounds.
        keep_memory: on the CPU, reuse freed memory (`keep_freed_memory`), unlike glibc's default.

    Returns:
        Rows, limits, the number of cases that ``stop_after`` left out, and the failures after which
        ``survive_failures`` let it continue.

    Raises:
        Disagreement: a candidate's result differs from the reference's.
    """
    if device == "cpu" and keep_memory:
        keep_freed_memory()
    result = result_of(f"{benchmark}_alone" if plan.alone else benchmark, device)
    where = result["environment"]
    print(f"{benchmark} on {where['device']}, {where['threads']} threads")
    if plan.resuming and plan.folder is not None:
        resume(result, plan.folder)
    for make in cases:
        if isinstance(make, Later) and not _wanted(make.sizes, result["rows"]):
            continue
        if time.monotonic() > plan.deadline:
            result["cases_left_out"] += 1
            continue
        try:
            _add_case(result, make(), device, quick)
        except Exception as error:
            if not plan.survive:
                raise
            result["failures"].append(f"{type(error).__name__}: {error}"[:1000])
            print(f"\nFAILED {result['failures'][-1]}", flush=True)
        if plan.folder is not None:
            write(result, plan.folder)
        if device == "cuda":
            torch.cuda.synchronize()  # after a wrong access nothing else can run: ends the process
    return result


def _add_case(result: Result, case: Case, device: str, quick: bool) -> None:
    """Checks, measures and prints one case."""
    if plan.alone:
        own = [c for c in case.candidates[:-1] if c.backend]
        case = replace(case, candidates=[*own, case.candidates[-1]], parts=[])
    elif plan.survive:
        case = _without_failures(case, result["failures"])
    else:
        check(case)
    dtype = dtype_name(case.dtype)
    if dtype not in result["limits"]:
        result["limits"][dtype] = limits(device, case.dtype, quick)
    rows = measure(case, device, result["limits"][dtype], quick)
    result["keys"] = list(dict.fromkeys([*result["keys"], *case.sizes, "dtype"]))
    result["rows"] += rows
    print(f"\n{case}\n{case_table(rows)}", flush=True)


def _without_failures(case: Case, failures: list[str]) -> Case:
    """The case without the candidates that fail; they are listed. Ours must not be among them."""
    failed: dict[str, Exception] = {}
    check(case, failed)
    if ours := failed.pop(case.candidates[-1].name, None):
        raise ours
    failures += [f"{DROPPED}{case}: {name}: {error}"[:1000] for name, error in failed.items()]
    return replace(case, candidates=[c for c in case.candidates if c.name not in failed])


DROPPED = "left out: "  # begins a line in a result's failures that concerns a candidate, not ours


@dataclass
class Plan:
    """What the command line, or a script such as `benchmarks.gpu_check`, asks of `run_cases`.

    Attributes:
        deadline: no case begins after it, in seconds of ``time.monotonic``.
        budget: seconds for timing each candidate; None leaves the choice to `measure`.
        alone: only this package's candidates are timed, and compared with nothing.
        survive: a case that fails is listed, and the next one follows.
        folder: where the result is written after each case; None writes it at the end alone.
        resuming: cases that the result in ``folder`` has are left out.
        only: cases whose sizes do not contain this text are left out.
    """

    deadline: float = float("inf")
    budget: float | None = None
    alone: bool = False
    survive: bool = False
    folder: Path | None = None
    resuming: bool = False
    only: str = ""


plan = Plan()


def _wanted(sizes: dict[str, Any], rows: Sequence[Row]) -> bool:
    """Whether ``--only`` selects a case of these sizes that has no rows yet."""
    there = any(all(row.get(key) == value for key, value in sizes.items()) for row in rows)
    return not there and plan.only in " ".join(map(str, sizes.values()))


def stop_after(seconds: float) -> None:
    """Makes ``run_cases`` begin no further case once this many seconds from now have passed."""
    plan.deadline = time.monotonic() + seconds


def time_briefly(seconds: float, *, alone: bool = False) -> None:
    """Makes ``run_cases`` spend about this many seconds on timing each candidate of a case.

    Args:
        seconds: for each candidate.
        alone: time only this package's candidates, and compare them with nothing; the result's name
            ends in "_alone".
    """
    plan.budget, plan.alone = seconds, alone


def survive_failures(folder: Path | None = None) -> None:
    """Makes ``run_cases`` list a case that fails, without figures, and continue.

    A candidate other than ours that fails or disagrees is listed and left out.

    Args:
        folder: folder for the result, written after each case in case the process is stopped.
    """
    plan.survive, plan.folder = True, folder


# ---- time and memory ---------------------------------------------------------


def measure(case: Case, device: str, rates: dict[str, float], quick: bool) -> list[Row]:
    """Times and peak memory of every part and candidate of a case, as rows of the result."""
    timed = [*case.parts, *case.candidates]
    budget = 3.0 if quick or device == "cuda" else 20.0
    if plan.budget is not None:
        budget = plan.budget * len(timed)
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
                "dtype": dtype_name(case.dtype),
                "candidate": candidate.name,
                "backend": candidate.backend,
                "median_ms": 1e3 * median,
                "fastest_ms": 1e3 * ordered[0],
                "spread": f"{1e3 * low:.3g}-{1e3 * high:.3g}",
                "calls": len(times),
                "times_ours": median / ours,
                **({"host_us": 1e6 * host_seconds(candidate.run)} if device == "cuda" else {}),
                "extra_MiB": peak_extra_memory(candidate.run, device),
                "bytes": case.bytes,
                "flops": case.flops,
                "limit_ms": 1e3 * max(copy, matmul),
                "limited_by": "copy" if copy >= matmul else "matmul",
                "share_of_limit": None if i < len(case.parts) else max(copy, matmul) / median,
                **(candidate.counts() if candidate.counts else {}),
            }
        )
    if device == "cuda" and ours <= graphs.SHORT:
        further = [{} for _ in case.parts] + graphs.columns(case, device)
        rows = [row | more for row, more in zip(rows, further, strict=True)]
    return rows


def command_line(run: Callable[[str, bool], list[Result]], description: str) -> int:
    """The ``main`` of a benchmark: parses the options, runs it and writes the results."""
    parser = parser_of(description)
    parser.add_argument("--quick", action="store_true", help="small sizes only, fewer rounds")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="with --threads 1, on a busy machine: count the time in which the process ran",
    )
    parser.add_argument("--seconds", type=float, help="begin no case after this time")
    parser.add_argument("--each-seconds", type=float, help="about how long to time each candidate")
    parser.add_argument("--only", default="", help="only cases whose sizes contain this text")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="write after every case, go on after one that fails, and leave out those that the "
        "result in --out has",
    )
    options = parsed(parser)
    if options.processor_time:
        if torch.get_num_threads() > 1 or options.device != "cpu":
            parser.error("--processor-time: only with --threads 1 on the CPU")
        count_processor_time()
    if options.seconds is not None:
        stop_after(options.seconds)
    if options.each_seconds is not None:
        time_briefly(options.each_seconds)
    if options.resume:
        survive_failures(options.out)
    plan.resuming, plan.only = options.resume, options.only
    return exit_status(lambda: write_all(run(options.device, options.quick), options.out))


def exit_status(measure: Callable[[], object]) -> int:
    """Measures; returns 1, after saying why, if something computed wrong numbers, otherwise 0."""
    try:
        measure()
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


def batch_column(batch: int) -> dict[str, int]:
    """A column for the batch of a case, where it is not one image."""
    return {} if batch == 1 else {"batch": batch}


def nbytes(*tensors: Tensor) -> int:
    """Total number of bytes of the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def backend_of(op: str, *inputs: Any, **options: Any) -> str:
    """The backend of this package that runs a call."""
    return mcibi_fast.explain(op, *inputs, **options).splitlines()[0].partition(": ")[2]
