"""Where ours is slower than PyTorch: every op at many sizes, dtypes and layouts on the CPU.

    mcibi-fast bench sweep [--quick] [--op OP] [--threads N] [--seconds S] [--out FOLDER] [--resume]

``benchmarks.sweep_cases`` has the cases. Outputs are compared first, then both are timed in turns
in blocks of calls of about a millisecond. With one thread the time of a block is that in which the
process ran, so that other programs disturb it less. The fastest block of each counts. The goal:
no case slower than 1.05 times PyTorch where PyTorch takes at least 50 us, and at most twice
PyTorch's time where it takes less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import TOLERANCE, Case, Disagreement
from benchmarks.machine import keep_freed_memory
from benchmarks.results import RESULTS, Result, Row, device_name, result_of, table, write
from benchmarks.sweep_cases import BOTH, cases
from mcibi_fast.files import write_atomically

BLOCK = 1e-3  # seconds of calls between two readings of the clock
TINY_US = 50  # below, the overhead of a call counts more than its work
SLOWER, TINY_SLOWER = 1.05, 2.0


def check(case: Case) -> None:
    """Compares ours with the truth, or without one with PyTorch's first way.

    Raises:
        Disagreement: the error is more than twice PyTorch's and more than rounding explains.
    """
    first, *others = [_tensors(c.run()) for c in case.candidates]
    truth = first if case.truth is None else _tensors(case.truth())
    theirs = max(_error(result, truth) for result in (first, *others[:-1]))
    bar = max(2 * theirs, case.tolerance or TOLERANCE[case.dtype])
    error = _error(others[-1], truth)
    if not error <= bar:
        raise Disagreement(f"{case}: the error of ours is {error:.2g}, more than {bar:.2g}")


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _error(results: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative error in the Euclidean norm; of label maps the share that differs."""
    errors = []
    for result, right in zip(results, truth, strict=True):
        if right.is_floating_point() or right.dim() < 3:
            norm = float(right.double().norm()) or 1.0
            errors.append(float((result.double() - right.double()).norm()) / norm)
        else:
            errors.append(float((result != right).double().mean()))
    return max(errors)


def fastest(runs: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """The fastest time per call of each function in microseconds, measured in turns."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def block(run: Callable[[], Any], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls

    once = [min(block(run, 1) for _ in range(2)) for run in runs]
    calls = [max(1, min(200, int(BLOCK / s))) for s in once]
    best, end, turns = list(once), time.perf_counter() + seconds, 0
    while turns < 3 or time.perf_counter() < end:
        for i in range(len(runs)):
            j = (turns + i) % len(runs)
            best[j] = min(best[j], block(runs[j], calls[j]))
        turns += 1
        if turns >= 2 and time.perf_counter() > end + 10 * seconds:
            break
    return [1e6 * s for s in best]


def row_of(case: Case, seconds: float) -> Row:
    """Measures a case: ours beside the fastest of PyTorch's ways."""
    *theirs, ours = case.candidates
    *others, us = fastest([c.run for c in case.candidates], seconds)
    pytorch = min(others)
    return {
        "op": case.op,
        **case.sizes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "candidate": "ours",
        "backend": ours.backend,
        "pytorch": theirs[others.index(pytorch)].name,
        "ours_us": us,
        "pytorch_us": pytorch,
        "ratio": us / pytorch,
        "slower": us / pytorch > (SLOWER if pytorch >= TINY_US else TINY_SLOWER),
    }


def kind_of(row: Row) -> str:
    """The op and what is timed of it."""
    parts = [row["op"], row["variant"], "with backward" if row["direction"] == BOTH else ""]
    return " ".join(part for part in parts if part)


def summary(rows: Sequence[Row]) -> list[Row]:
    """By op: how many cases are slower, the worst ratios, and the median."""
    lines = []
    for kind in sorted({kind_of(row) for row in rows}):
        own = [row for row in rows if kind_of(row) == kind]
        large = [row for row in own if row["pytorch_us"] >= TINY_US]
        tiny = [row for row in own if row["pytorch_us"] < TINY_US]
        lines.append(
            {
                "op": kind,
                "cases": len(own),
                "slower": sum(row["slower"] for row in own),
                "slower %": 100 * sum(row["slower"] for row in own) / len(own),
                "worst": max((row["ratio"] for row in large), default=None),
                "worst tiny": max((row["ratio"] for row in tiny), default=None),
                "median": statistics.median(row["ratio"] for row in own),
            }
        )
    return lines


def report(result: Result, worst: int = 40) -> str:
    """The summary and the slowest cases in Markdown."""
    where, rows = result["environment"], result["rows"]
    machine = (
        f"{where['device']} ({where['processor']}), {where['threads']} threads, PyTorch "
        f"{where['torch']}, load {where['load']} to {where['load_after']}"
    )
    columns = ("op", "variant", "direction", "dtype", "layout", "K", "map", "labels", "N", "D", "Z")
    columns += ("backend", "pytorch_us", "ours_us", "ratio")
    ordered = sorted(rows, key=lambda row: -row["ratio"])[:worst]
    shown = [{name: row.get(name, "") for name in columns} for row in ordered]
    return (
        f"# Ours beside PyTorch: {len(rows)} cases\n\n{machine}.\n\nRatios are ours / PyTorch's "
        f"fastest time. A case is slower above {SLOWER}, and above {TINY_SLOWER:g} where PyTorch "
        f"takes less than {TINY_US} us (tiny).\n\n{_markdown(summary(rows))}\n\n"
        f"## The slowest\n\n{_markdown(shown)}\n"
    )


def _markdown(rows: Sequence[Row]) -> str:
    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[cell(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def processor() -> str:
    """Family, model and the instructions that decide which kernels are fast, from Linux."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = dict(reversed([tuple(map(str.strip, li.split(":", 1))) for li in lines if ":" in li]))
    flags = found.get("flags", "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    having = [f"{'' if flag in flags else 'no '}{flag}" for flag in wanted]
    number = f"family {found.get('cpu family', '?')} model {found.get('model', '?')}"
    return ", ".join([number, *having])


def _identity(row: Row, columns: Iterable[str]) -> str:
    return json.dumps({name: row[name] for name in columns if name in row}, sort_keys=True)


def _begun(folder: Path, result: Result) -> Result:
    """The result of an interrupted run on the same commit and device, or else ``result``."""
    path = folder / f"sweep-{device_name(result)}.json"
    earlier: Result | None = json.loads(path.read_text()) if path.exists() else None
    if earlier and earlier["environment"]["commit"] == result["environment"]["commit"]:
        return earlier
    return result


def run(
    folder: Path,
    op: str | None = None,
    quick: bool = False,
    seconds: float = 0.4,
    resume: bool = False,
) -> Result:
    """Compares and measures all cases, printing the slower ones.

    Args:
        folder: for the results, written as they come.
        op: only this kind of case.
        quick: a few sizes.
        seconds: of timing for a case.
        resume: keep the rows that a run on the same commit left in the folder.
    """
    keep_freed_memory()
    result = result_of("sweep", "cpu")
    result["environment"]["processor"] = processor()
    if resume:
        result = _begun(folder, result)
    done = {_identity(row, result["keys"]) for row in result["rows"]}
    for name, make in cases(quick):
        if op not in (None, name):
            continue
        case = make()
        if case is None:
            continue
        row = {"op": case.op, **case.sizes, "dtype": str(case.dtype).removeprefix("torch.")}
        if _identity(row, row) in done:
            continue
        result["keys"] = list(dict.fromkeys([*result["keys"], "op", *case.sizes, "dtype"]))
        try:
            check(case)
        except Disagreement as error:
            result["failures"].append(str(error))
            print(f"FAILED {error}", flush=True)
            continue
        row = row_of(case, seconds)
        result["rows"].append(row)
        result["environment"]["load_after"] = round(os.getloadavg()[0], 2)
        if len(result["rows"]) % 25 == 0:
            write_report(result, folder)
        if row["slower"]:
            print(f"{row['ratio']:6.2f}  {row['ours_us']:9.0f} us  {case}", flush=True)
    return result


def write_report(result: Result, folder: Path) -> Path:
    """Writes JSON, CSV and Markdown; returns the path of the last."""
    write(result, folder)
    path = folder / f"sweep-{device_name(result)}.md"
    write_atomically(path, report(result).encode())
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few sizes of every op")
    parser.add_argument("--op", help="only this kind of case, such as cross_entropy")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--seconds", type=float, help="of timing for each case (default: 0.4)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu", help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    options = parser.parse_args()
    kinds = sorted({name for name, _ in cases()})
    if options.op not in (None, *kinds):
        parser.error(f"--op: {options.op!r} is none of {', '.join(kinds)}")
    if options.threads < 1:
        parser.error(f"--threads: must be at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    seconds = options.seconds or (0.1 if options.quick else 0.4)
    result = run(options.out, options.op, options.quick, seconds, options.resume)
    if not result["rows"]:
        print("nothing to report: no case agreed", file=sys.stderr)
        return 1
    print(f"\n{table(summary(result['rows']), digits=2)}")
    print(f"\nwrote {write_report(result, options.out)}, .csv and .json")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
