"""Checks everything that needs a GPU, in one command: ``python -m benchmarks.gpu_check``.

It builds the extension. Then, at the same time, it runs the tests of the ops, compares every op,
dtype and layout at the paper's sizes with a float64 reference, looks for host syncs, captures CUDA
graphs, runs compute-sanitizer and a short training. After that the benchmarks run, one by one with
the GPU to themselves. The findings of each stage are written to one JSON file, the results of the
benchmarks beside it (`benchmarks.results`), and a table is printed.

Each stage (`benchmarks.gpu_stages`) is a process with a time limit, so that a kernel that crashes
or hangs affects only its own figures. A stage that fails is reported and the next one runs; the
exit status is 1 if any failed. Everything ends within ``--minutes``; stages for which no time was
left are listed as skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.results import RESULTS, Result, Row, read

Report = dict[str, Any]
BESIDE = {  # stages that check correctness, run at the same time, and their largest seconds
    "hot_path": 60,
    "bad_labels": 40,
    "accuracy": 110,
    "tests": 130,
    "sanitizer": 120,
    "training": 110,
}
SPEED = {  # benchmarks, run one by one, most important first, and their largest seconds
    "bench_memory_update": 35,
    "bench_gaussian_aggregate": 45,
    "bench_head": 35,
    "bench_class_rank_attention": 25,
    "bench_upsample_cross_entropy": 20,
    "bench_upsample_argmax": 15,
    "bench_confidence_attention": 30,
    "bench_model": 35,
    "bench_context": 15,
    "bench_video": 25,
}
TABLE7 = {"table7": 35}
OTHER_SPEED = 25  # seconds for a benchmark that is not listed
RESERVE = 10  # seconds kept at the end to stop what still runs


@dataclass
class Running:
    """The process of a stage."""

    name: str
    process: subprocess.Popen[bytes]
    result: Path
    log: Path
    start: float
    end: float


class Check:
    """Runs stages until the time is up and collects their findings."""

    def __init__(self, device: str, minutes: float, out: Path, folder: Path) -> None:
        self.device = device
        self.deadline = time.monotonic() + 60 * minutes - RESERVE
        self.out = out
        self.folder = folder
        self.report: Report = {}

    def run(self, limits: dict[str, float]) -> None:
        """Runs these stages at the same time; returns when all have ended."""
        running = [r for name, s in limits.items() if (r := self.start(name, s)) is not None]
        while running:
            time.sleep(0.05)
            for stage in list(running):
                if stage.process.poll() is not None or time.monotonic() > stage.end:
                    running.remove(stage)
                    self.finish(stage)

    def start(self, name: str, seconds: float) -> Running | None:
        now = time.monotonic()
        seconds = min(seconds, self.deadline - now)
        if seconds < 5:
            self.keep(name, {"ok": True, "skipped": "no time was left"}, 0.0)
            return None
        result, log = self.folder / f"{name}.json", self.folder / f"{name}.log"
        command = [sys.executable, "-m", "benchmarks.gpu_stages", name, str(result)]
        command += ["--seconds", str(seconds), "--device", self.device]
        command += ["--results", str(self.out.parent.resolve())]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )
        return Running(name, process, result, log, now, now + seconds + RESERVE / 2)

    def finish(self, stage: Running) -> None:
        stopped = stage.process.poll() is None
        with suppress(ProcessLookupError):  # processes that it started may still run
            os.killpg(stage.process.pid, signal.SIGKILL)
        stage.process.wait()
        seconds = time.monotonic() - stage.start
        try:
            result: Report = json.loads(stage.result.read_text())
        except (OSError, ValueError):
            result = {"ok": False, "error": f"it ended with {stage.process.returncode}"}
        if stopped:
            result |= {"ok": False, "error": f"stopped after {seconds:.0f} s"}
        if not result["ok"]:
            text = stage.log.read_text(errors="replace")
            result["log"] = text[-3000:]
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.with_suffix(".log").open("a") as file:
                file.write(f"==== {stage.name}\n{text}\n")
        self.keep(stage.name, result, seconds)

    def keep(self, name: str, result: Report, seconds: float) -> None:
        """Adds a stage to the report and writes it at once, in case the machine stops."""
        result["stage_seconds"] = round(seconds, 1)
        self.report[name] = result
        verdict = "skipped" if "skipped" in result else "ok" if result["ok"] else "FAILED"
        reason = result.get("skipped") or result.get("error") or result.get("failures") or ""
        print(f"{name:<28} {verdict:<8} {seconds:6.1f} s  {str(reason)[:1500]}", flush=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.report, indent=1, default=str) + "\n")


def benchmarks() -> dict[str, float]:
    """All benchmarks with their largest seconds, those of ``SPEED`` first."""
    found = sorted(p.stem for p in (ROOT / "benchmarks").glob("bench_*.py"))
    known = [name for name in SPEED if name in found]
    return {name: SPEED.get(name, OTHER_SPEED) for name in dict.fromkeys([*known, *found])}


def summary(results: Iterable[Result]) -> Iterator[str]:
    """One line for each case: our time, its share of the limit, and the other candidates."""
    for result in results:
        cases: dict[str, list[Row]] = {}
        for row in result["rows"]:
            sizes = " ".join(str(row[key]) for key in result["keys"] if key in row)
            cases.setdefault(sizes, []).append(row)
        for case, rows in cases.items():
            ours = rows[-1]
            others = ", ".join(f"{r['candidate']} {r['times_ours']:.2f}x" for r in rows[:-1])
            yield (
                f"{result['benchmark']} {case}: {ours['median_ms']:.4g} ms, "
                f"{ours['share_of_limit']:.0%} of {ours['limited_by']}; {others}"
            )


def main() -> int:
    """Runs the stages and writes the report."""
    every = ["environment", "build", "matrix_instructions", *BESIDE, *benchmarks(), *TABLE7]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="JSON file (default: benchmarks/results/GPU/gpu_check.json)"
    )
    parser.add_argument("--only", nargs="+", choices=every, metavar="STAGE", help=", ".join(every))
    parser.add_argument("--minutes", type=float, default=7.5, help="time limit (default: 7.5)")
    parser.add_argument("--dry-run", action="store_true", help="try the stages on the CPU")
    options = parser.parse_args()
    device, out = "cpu", ROOT / "runs" / "gpu_check_dry_run" / "gpu_check.json"
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("gpu_check: no CUDA device is visible; this script needs one", file=sys.stderr)
            return 2
        name = torch.cuda.get_device_name(0).replace(" ", "_")
        device, out = "cuda", RESULTS / name / "gpu_check.json"
    out = options.out or out
    chosen = set(options.only or every)
    with tempfile.TemporaryDirectory() as folder:
        check = Check(device, options.minutes, out, Path(folder))
        for together in (
            {"environment": 60.0, "build": 200.0, "matrix_instructions": 60.0},
            {stage: float(seconds) for stage, seconds in BESIDE.items()},
            *({stage: seconds} for stage, seconds in (benchmarks() | TABLE7).items()),
        ):
            check.run({s: seconds for s, seconds in together.items() if s in chosen})
            if not check.report.get("build", {"ok": True})["ok"]:
                print("gpu_check: stopped: the build failed, so no kernel could be tested")
                return 1
    ran = [r for r in read(out.parent) if f"bench_{r['benchmark']}" in check.report]
    print("\n" + "\n".join(summary(ran)) + f"\nwrote {out}")
    return int(not all(result["ok"] for result in check.report.values()))


if __name__ == "__main__":
    sys.exit(main())
