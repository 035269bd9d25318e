"""Checks and times everything that needs a GPU, in one command: ``python -m benchmarks.gpu_check``.

In this order: (a) the machine, the CUDA part (used as it was carried here, or compiled here), calls
that must not wait for the device, CUDA graphs, wrong labels; (b) every op, dtype and layout at the
paper's sizes compared with float64; (c) the times of our kernels alone; (d) the same cases beside
PyTorch's; (e) whole heads and models; (f) a short training, the tests, compute-sanitizer. Short
calls are also timed as CUDA graphs.

Each stage (`benchmarks.gpu_stages`) is a process with a time limit, so that a kernel that crashes
or hangs affects only its own figures: a stage that fails is reported and the next one runs, and the
benchmarks that come after a crash run in another process. The exit status is 1 if any stage failed.
Everything ends within ``--minutes``; stages for which no time was left are listed as skipped.

The folder ``--out`` has four files, each of which is up to date while the command runs:
gpu_check.json (findings of the stages), gpu_check.log (output of those that failed), results.zip
(results of the benchmarks, `benchmarks.results`) and summary.txt (one line per case).
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
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.results import RESULTS, Result, Row, read

Report = dict[str, Any]
MINUTES = 9.0  # the seconds below are for this long a run
# (a)
MACHINE = {"environment": 60, "build": 200}
FIRST = {"hot_path": 45, "bad_labels": 45}
# (b) the ops whose kernels are most likely to be kept as they are come first
ACCURACY = {
    f"accuracy_{op}": 60
    for op in (
        *("upsample_cross_entropy", "class_rank_attention", "upsample_argmax"),
        *("upsample_confusion", "class_feature_sums", "memory_update"),
        *("gaussian_aggregate", "confidence_attention"),
    )
}
# (c), (d), (e): seconds of all benchmarks together
SPEED = {"ours": 110, "peers": 130, "whole": 90}
OPS = [
    "bench_upsample_cross_entropy",
    "bench_class_rank_attention",
    "bench_memory_update",
    "bench_gaussian_aggregate",
    "bench_upsample_argmax",
    "bench_confidence_attention",
]
WHOLE = ["bench_head", "bench_model", "bench_context", "bench_video", "table7_contexts"]
# Nothing for a GPU's minutes.
OF_THE_HOST = {"bench_dropin", "bench_inference", "bench_loader", "bench_step"}
# (f)
LAST = {"training": 100, "sanitizer": 100, "tests": 100, "matrix_instructions": 60}
KEPT_FOR_LAST = 60  # seconds that the benchmarks leave
RESERVE = 10  # seconds kept at the end to stop what still runs
AT_ONCE = 4  # stages that check values


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
        self.scale = min(1.0, minutes / MINUTES)
        self.deadline = time.monotonic() + 60 * minutes - RESERVE
        self.out = out
        self.folder = folder
        self.results = folder / "results"
        self.report: Report = {}
        self.packed = 0.0
        out.mkdir(parents=True, exist_ok=True)

    def run(
        self, limits: dict[str, float], at_once: int = 8, arguments: Sequence[str] = ()
    ) -> None:
        """Runs stages in this order, several at the same time; returns when all have ended."""
        waiting, running = list(limits.items()), list[Running]()
        while running or waiting:
            while waiting and len(running) < at_once:
                if (stage := self.start(*waiting.pop(0), arguments)) is not None:
                    running.append(stage)
            time.sleep(0.05)
            for stage in list(running):
                if stage.process.poll() is not None or time.monotonic() > stage.end:
                    running.remove(stage)
                    self.finish(stage)
            if time.monotonic() > self.packed + 15:
                self.pack()

    def run_benchmarks(self, kind: str, names: list[str]) -> None:
        """Runs benchmarks in one process, and those after a crash in another one."""
        left, part = list(names), 1
        end = time.monotonic() + self.scale * SPEED[kind]
        while left:
            seconds = min(end, self.deadline - self.scale * KEPT_FOR_LAST) - time.monotonic()
            name = kind if part == 1 else f"{kind}_{part}"
            self.run({name: seconds}, arguments=["--benchmarks", *left])
            begun = self.report[name].get("begun", [])
            if not begun and "skipped" not in self.report[name]:
                begun = left[:1]  # it crashed before it could say what it began
            if not begun:
                break
            left, part = [n for n in left if n not in begun], part + 1

    def start(self, name: str, seconds: float, arguments: Sequence[str] = ()) -> Running | None:
        now = time.monotonic()
        seconds = min(seconds, self.deadline - now)
        if seconds < 5:
            self.keep(name, {"ok": True, "skipped": "no time was left"}, 0.0)
            return None
        result, log = self.folder / f"{name}.json", self.folder / f"{name}.log"
        command = [sys.executable, "-m", "benchmarks.gpu_stages", name, str(result)]
        command += ["--seconds", str(seconds), "--device", self.device]
        command += ["--results", str(self.results), *arguments]
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
            result = {"ok": False}
        if stopped:
            result |= {"ok": False, "error": f"stopped after {seconds:.0f} s"}
        elif not result.get("done"):
            result |= {"ok": False, "error": f"it ended with {stage.process.returncode}"}
        if not result["ok"]:
            text = stage.log.read_text(errors="replace")
            result["log"] = text[-3000:]
            with (self.out / "gpu_check.log").open("a") as file:
                file.write(f"==== {stage.name}\n{text[-200_000:]}\n")
        self.keep(stage.name, result, seconds)

    def keep(self, name: str, result: Report, seconds: float) -> None:
        """Adds a stage to the report and writes it at once, in case the machine stops."""
        result["stage_seconds"] = round(seconds, 1)
        self.report[name] = result
        verdict = "skipped" if "skipped" in result else "ok" if result["ok"] else "FAILED"
        reason = result.get("skipped") or result.get("error") or result.get("failures") or ""
        print(f"{name:<32} {verdict:<8} {seconds:6.1f} s  {str(reason)[:700]}", flush=True)
        text = json.dumps(self.report, indent=1, default=str)
        (self.out / "gpu_check.json").write_text(text + "\n")
        self.pack()

    def pack(self) -> None:
        """Writes the benchmarks' results so far into one file, and their summary."""
        self.packed = time.monotonic()
        found = read(self.results)
        if not found:
            return
        partial = self.out / "results.partial"
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(self.results.rglob("*")):
                if path.suffix in (".json", ".csv"):
                    file.write(path, path.relative_to(self.results))
        partial.replace(self.out / "results.zip")
        (self.out / "summary.txt").write_text("\n".join(summary(found)) + "\n")


def summary(results: Iterable[Result]) -> Iterator[str]:
    """One line for each case: our time, its share of the limit, and the other candidates."""
    for result in results:
        cases: dict[str, list[Row]] = {}
        for row in result["rows"]:
            sizes = " ".join(str(row[key]) for key in result["keys"] if key in row)
            cases.setdefault(sizes, []).append(row)
        for case, rows in cases.items():
            ours = rows[-1]
            others = ", ".join(f"{r['candidate']} {_times_ours(r, ours)}" for r in rows[:-1])
            host = f", host {ours['host_us']:.0f} us" if "host_us" in ours else ""
            if "graph_ms" in ours:
                host += f", as a graph {ours['graph_ms']:.4g} ms"
            yield (
                f"{result['benchmark']} {case}: {ours['median_ms']:.4g} ms{host}, "
                f"{ours['share_of_limit']:.0%} of {ours['limited_by']}; {others or 'alone'}"
            )
        yield from (f"{result['benchmark']} FAILED {line[:300]}" for line in result["failures"])


def _times_ours(row: Row, ours: Row) -> str:
    """A candidate's time as a multiple of ours, and the same of both as CUDA graphs."""
    graph = ""
    if "graph_ms" in row and "graph_ms" in ours:
        graph = f" (graphs {row['graph_ms'] / ours['graph_ms']:.2f}x)"
    return f"{row['times_ours']:.2f}x{graph}"


def main() -> int:
    """Runs the stages and writes the report."""
    stages = {**MACHINE, **FIRST, **ACCURACY, **SPEED, **LAST}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: benchmarks/results/GPU)"
    )
    every = ", ".join(stages)
    parser.add_argument("--only", nargs="+", choices=stages, metavar="STAGE", help=every)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time limit (default: 9)")
    parser.add_argument("--dry-run", action="store_true", help="try the stages on the CPU")
    options = parser.parse_args()
    device, out = "cpu", ROOT / "runs" / "gpu_check_dry_run"
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("gpu_check: no CUDA device is visible; this script needs one", file=sys.stderr)
            return 2
        device, out = "cuda", RESULTS / torch.cuda.get_device_name(0).replace(" ", "_")
    with tempfile.TemporaryDirectory() as folder:
        check = Check(device, options.minutes, options.out or out, Path(folder))

        def chosen(limits: dict[str, int]) -> dict[str, float]:
            names = options.only or stages
            return {name: check.scale * s for name, s in limits.items() if name in names}

        check.run(chosen(MACHINE))
        check.run(chosen(FIRST))
        check.run(chosen(ACCURACY), at_once=AT_ONCE)
        for kind in chosen(SPEED):
            check.run_benchmarks(kind, WHOLE if kind == "whole" else OPS)
        check.run(chosen(LAST))
        check.pack()
        lines = list(summary(read(check.results)))
    print("\n" + "\n".join(lines) + f"\nwrote {check.out}")
    return int(not all(result["ok"] for result in check.report.values()))


if __name__ == "__main__":
    sys.exit(main())
