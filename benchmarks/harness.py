"""What the benchmarks of the ops share: agreement first, then time, memory, the machine's limits.

A benchmark is a list of cases; a case holds several ways to compute the same tensor. Before a case
is timed all its results are compared, and where one disagrees nothing is reported. Timings are
interleaved (every candidate once per round, in turning order) and given as medians, so that a
machine that is busy for a while slows all of them. Beside each time stands its share of the limit:
what copying the inputs and outputs, or doing the multiplications, would take at the rates that
PyTorch's own copy and matrix product were just measured to reach here. What stays in a cache, or
multiplies better than PyTorch does, can be above 100 %.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mcibi_fast

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
COLUMNS = {  # of the printed table: key, heading, format
    "candidate": ("", "{}"),
    "median_ms": ("ms", "{:.3g}"),
    "spread": ("10-90 %", "{}"),
    "times_ours": ("/ ours", "{:.2f}"),
    "extra_MiB": ("extra MiB", "{:.1f}"),
    "share_of_limit": ("of limit", "{:.0%}"),
}


class Disagreement(RuntimeError):
    """Two candidates computed different things, so there is no speed to report."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    Args:
        name: "reference", "eager", "compile", "sdpa" or "ours"; the first of a case is what the
            others are compared with.
        run: computes the result from inputs that it holds.
        backend: which kernel of ours runs.
    """

    name: str
    run: Callable[[], Tensor]
    backend: str = ""


@dataclass(frozen=True)
class Case:
    """One size, dtype and direction of an op.

    Args:
        op: its name.
        sizes: what tells the cases of the op apart, as columns of the results.
        dtype: of the inputs.
        candidates: the reference first.
        bytes: of the inputs that must be read and the outputs that must be written, once each.
        flops: of the multiplications and additions that cannot be avoided.
    """

    op: str
    sizes: dict[str, Any]
    dtype: torch.dtype
    candidates: list[Candidate]
    bytes: int
    flops: int

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {value}" for name, value in self.sizes.items())
        return f"{self.op}: {sizes}, {str(self.dtype).removeprefix('torch.')}"


Row = dict[str, Any]


def run_cases(
    op: str, cases: Iterable[Callable[[], Case]], device: str, quick: bool
) -> dict[str, Any]:
    """Checks and measures the cases one after another, printing each.

    Args:
        op: the op's name, for the report.
        cases: functions that make the inputs, so that one case is in memory at a time.
        device: "cpu" or "cuda".
        quick: fewer rounds.

    Returns:
        A report that JSON can hold: environment, limits, rows.

    Raises:
        Disagreement: a candidate's result differs from the reference's.
    """
    if device == "cpu":
        keep_freed_memory()
    report: dict[str, Any] = {"op": op, "environment": environment(device), "rows": []}
    print(f"{op} on {report['environment']['device']}, {report['environment']['threads']} threads")
    rates: dict[str, Any] = {}
    for make in cases:
        case = make()
        check(case)
        if str(case.dtype) not in rates:
            rates[str(case.dtype)] = limits(device, case.dtype, quick)
        rows = measure(case, device, rates[str(case.dtype)], quick)
        print(f"\n{case}\n{table(rows)}", flush=True)
        report["rows"] += rows
    report["limits"] = rates
    return report


def check(case: Case) -> None:
    """Compares all results with the first candidate's: largest error over largest value.

    Raises:
        Disagreement: one is further away than the dtype explains.
    """
    first, *others = case.candidates
    expected = first.run().double()
    for other in others:
        result = other.run().double()
        if result.shape != expected.shape:
            raise Disagreement(
                f"{case}: {other.name} gave {tuple(result.shape)}, not the shape of "
                f"{first.name}, {tuple(expected.shape)}"
            )
        error = float((result - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE[case.dtype]:
            raise Disagreement(f"{case}: {other.name} is {error:.2g} away from {first.name}")


def measure(case: Case, device: str, rates: dict[str, float], quick: bool) -> list[Row]:
    """Times and peak memory of every candidate of a case, as rows of the results."""
    seconds = interleaved([c.run for c in case.candidates], device, budget=3 if quick else 20)
    ours = statistics.median(seconds[-1])
    limit = max(case.bytes / rates["copy_GB_s"], case.flops / rates["matmul_GFLOP_s"]) / 1e9
    rows = []
    for candidate, times in zip(case.candidates, seconds, strict=True):
        median, ordered = statistics.median(times), sorted(times)
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        rows.append(
            {
                "op": case.op,
                **case.sizes,
                "dtype": str(case.dtype).removeprefix("torch."),
                "candidate": candidate.name,
                "backend": candidate.backend,
                "median_ms": 1e3 * median,
                "fastest_ms": 1e3 * ordered[0],
                "spread": f"{1e3 * low:.3g}-{1e3 * high:.3g}",
                "calls": len(times),
                "times_ours": median / ours,
                "extra_MiB": peak_extra_memory(candidate.run, device),
                "limit_ms": 1e3 * limit,
                "limited_by": "copy"
                if limit == case.bytes / rates["copy_GB_s"] / 1e9
                else "matmul",
                "share_of_limit": limit / median,
            }
        )
    return rows


# ---- time --------------------------------------------------------------------


def interleaved(runs: list[Callable[[], Any]], device: str, budget: float) -> list[list[float]]:
    """Seconds per call of each function, measured in rounds until the budget is spent.

    A block of calls starts with one that is not counted, so that allocator and caches hold what
    this function left there, not what the one before it did.
    """
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    once = [min(clock(run) for _ in range(2)) for run in runs]
    block = [4 if seconds < 0.05 else 2 if seconds < 0.5 else 1 for seconds in once]
    round_seconds = sum(s * (n + 1) for s, n in zip(once, block, strict=True))
    rounds = max(3, min(25, int(budget / round_seconds)))
    result: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for i in range(len(runs)):
            j = (turn + i) % len(runs)
            if block[j] > 1:
                clock(runs[j])
            result[j] += [clock(runs[j]) for _ in range(block[j])]
    return result


def keep_freed_memory() -> None:
    """Makes glibc reuse what is freed, for the rest of the process, as PyTorch does on CUDA.

    Otherwise large results come from fresh pages in some calls and not in others, and on many
    machines their faults cost more than the op: they would be what is timed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: all from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def _cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Callable[[], Any]) -> float:
    """Time on the device with cold caches; the launches are queued while the caches are filled."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cache_filler().zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _cache_filler() -> Tensor:
    return torch.empty(512 * 2**20, dtype=torch.uint8, device="cuda")


# ---- memory ------------------------------------------------------------------


def peak_extra_memory(run: Callable[[], Any], device: str) -> float | None:
    """MiB above the inputs while the function runs, its result included; None where unknown.

    On CUDA by the allocator's own count; on Linux by the process's resident memory, whose peak
    the kernel keeps, and which sees what libraries allocate besides PyTorch.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that using it again counts
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident("VmRSS")
    run()
    return max(0.0, _resident("VmHWM") - before) / 2**20


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# ---- the machine -------------------------------------------------------------


def limits(device: str, dtype: torch.dtype, quick: bool = False) -> dict[str, float]:
    """The rates this machine reaches: GB/s read plus written by a copy, GFLOP/s of a product."""
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    source = torch.ones((1024 if device == "cuda" else 128) * 2**18, device=device)  # 4 bytes each
    target = torch.empty_like(source)
    n = 8192 if device == "cuda" else 1024 if quick else 2048
    g = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(n, n, generator=g, device=device).to(dtype)
    copy = min(clock(lambda: target.copy_(source)) for _ in range(5))
    product = min(clock(lambda: matrix @ matrix) for _ in range(5))
    return {
        "copy_GB_s": 2 * 4 * source.numel() / copy / 1e9,
        "matmul_GFLOP_s": 2 * n**3 / product / 1e9,
    }


def environment(device: str) -> dict[str, Any]:
    """Device, versions and commit."""
    info = mcibi_fast.build_info()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # what else ran: 0 on a machine of one's own
        "cpu_flavour": info["cpu_flavour"],
        "mcibi_fast": info["version"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "python": platform.python_version(),
        "commit": _commit(),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


# ---- results -----------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """The rows of one case as text, the limit below."""
    text = [[heading for heading, _ in COLUMNS.values()]]
    for row in rows:
        text.append(
            [
                "-" if row[key] is None else form.format(row[key])
                for key, (_, form) in COLUMNS.items()
            ]
        )
    widths = [max(len(line[i]) for line in text) for i in range(len(COLUMNS))]
    lines = []
    for line in text:
        cells = [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *cells]))
    ours = rows[-1]
    lines.append(f"limit {ours['limit_ms']:.3g} ms ({ours['limited_by']}); ours: {ours['backend']}")
    return "\n".join("  " + line for line in lines)


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes <op>-<device>.json, and .csv with one line per candidate and the environment."""
    folder.mkdir(parents=True, exist_ok=True)
    env = report["environment"]
    name = "".join(c if c.isalnum() else "_" for c in f"{env['device']}_{env['threads']}t")
    path = folder / f"{report['op']}-{name}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*report["rows"][0], *env])
        writer.writeheader()
        writer.writerows({**row, **env} for row in report["rows"])
    print(f"\nwrote {path}.json and .csv")


def command_line(run: Callable[[str, bool], dict[str, Any]], description: str) -> int:
    """``main`` of a benchmark: parses the options, runs, writes the results."""
    parser = argparse.ArgumentParser(description=description)
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_cuda else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes only, fewer rounds")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for CSV and JSON")
    options = parser.parse_args()
    if options.device == "cuda" and not has_cuda:
        parser.error("--device cuda: no CUDA device is visible")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads: must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    try:
        write(run(options.device, options.quick), options.out)
    except Disagreement as error:
        print(f"nothing to report: {error}", file=sys.stderr)
        return 1
    return 0


# ---- what the benchmarks make their cases from -------------------------------


def dtypes(device: str) -> list[torch.dtype]:
    """Those worth timing: on the CPU float32 alone."""
    return [torch.float32, torch.bfloat16, torch.float16] if device == "cuda" else [torch.float32]


def randn(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same in every run."""
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=g).to(device, dtype)


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def backend_of(op: str, *inputs: Any, **options: Any) -> str:
    """Which backend of ours runs a call."""
    return mcibi_fast.explain(op, *inputs, **options).splitlines()[0].partition(": ")[2]
