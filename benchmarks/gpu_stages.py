"""The stages of `benchmarks.gpu_check`, each of which runs in its own process:
``python -m benchmarks.gpu_stages NAME REPORT.json --seconds S``.

A stage returns its findings, with "failed" above 0 if something is wrong, or raises an error. The
stages that are benchmarks write their results into the folder ``--results``. With ``--device cpu``
the stages that can run on a CPU do so at small sizes: this tests the stages, not the kernels.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import gpu_accuracy, harness, results
from benchmarks.gpu_accuracy import DTYPES, Report
from benchmarks.gpu_hot_path import hot_path, split_keys
from benchmarks.machine import ROOT


def shell(*command: str, timeout: float, **environment: str) -> str:
    """Runs a command in the checkout and returns what it printed.

    Raises:
        RuntimeError: it failed or took too long; the message ends with the last part of its output.
    """
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if error.stdout else ""
        raise RuntimeError(f"{command[0]} took over {timeout:.0f} s:\n{output[-3000:]}") from None
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed ({done.returncode}):\n{done.stdout[-3000:]}"
        )
    return done.stdout


# ---- the machine and the build ------------------------------------------------------------


def environment(device: str, seconds: float) -> Report:
    """The environment of the results, the GPU, and which parts of the package can be imported."""
    imports = {}
    for name in ("ops", "nn", "metrics", "models", "data", "recipes", "inference", "training"):
        try:
            importlib.import_module(f"mcibi_fast.{name}")
        except ImportError as error:
            imports[name] = str(error)
    failures = [f"mcibi_fast.{name}: {why}" for name, why in imports.items()]
    environment = importlib.import_module("mcibi_fast.training.environment")
    found: Report = {"failed": len(failures), "failures": failures, "cores": os.cpu_count()}
    found |= environment.environment(device)
    for name in ("triton", "timm"):
        spec = importlib.util.find_spec(name)
        found[name] = importlib.import_module(name).__version__ if spec else None
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_GiB": round(gpu.total_memory / 2**30, 1),
            "driver": shell(*query, timeout=20).strip(),
        }
    return found


def build(device: str, seconds: float) -> Report:
    """Uses the CUDA part that was carried here if it can run here, and otherwise compiles it.

    Neither needs setuptools or the headers of Python. On the CPU nothing is compiled.
    """
    carried, why_not = _cuda_part(device)
    if why_not is None:
        return {"how": "carried", **carried}
    if device == "cpu":
        return {"skipped": f"the CUDA part was not tried: {why_not}"}
    major, minor = torch.cuda.get_device_capability()
    options = {"MCIBI_FAST_CPU": "0", "MCIBI_FAST_CUDA": "1"}
    options["MCIBI_FAST_CUDA_ARCHS"] = f"{major}.{minor}"
    output = shell(sys.executable, "-m", "buildtools.build", timeout=seconds, **options)
    built, still = _cuda_part(device)
    if still is not None:
        raise RuntimeError(f"the CUDA part cannot be used: {still}\n{output[-2000:]}")
    return {"how": "compiled here", "instead_of_carried": why_not, **built}


def _cuda_part(device: str) -> tuple[Report, str | None]:
    """What the installed CUDA part is, and why it cannot be used here; in a process of its own."""
    from buildtools import plan

    record = ROOT / "mcibi_fast" / "_build_record.json"
    part = json.loads(record.read_text())["cuda"] if record.is_file() else {}
    if not part.get("built"):
        return {}, part.get("reason", "there is none")
    if part.get("sources") != plan.cuda_digest(ROOT):
        return {}, "it was built from other sources"
    program = (
        "import json, mcibi_fast; from mcibi_fast import _build; "
        "print(json.dumps([mcibi_fast.build_info(), _build.load_extensions()['cuda']]))"
    )
    info, unloadable = json.loads(
        shell(sys.executable, "-c", program, timeout=100).splitlines()[-1]
    )
    usable = info["backends"]["cuda"]
    return info | {"nvcc": part["nvcc"]}, (
        unloadable or (None if usable is True or device == "cpu" else usable)
    )


def matrix_instructions(device: str, seconds: float) -> Report:
    """Compares the emulated matrix instructions, which the tests rely on, with the hardware's."""
    from buildtools import toolchain

    if device != "cuda":
        return {"skipped": "needs a GPU"}
    try:
        nvcc = toolchain.find_cuda().nvcc
    except toolchain.Unavailable as error:
        return {"skipped": str(error)}
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/intrinsics_test"
        flags = ["-x", "cu", "-std=c++17", "-arch=native", "-Icsrc", "-o", program]
        shell(nvcc, *flags, "csrc/testing/intrinsics_test.cpp", timeout=seconds)
        return {"output": shell(program, timeout=seconds).strip()}


# ---- correctness -------------------------------------------------------------


def tests(device: str, seconds: float) -> Report:
    """Runs the tests of the ops and kernels, which on a GPU include every op on CUDA."""
    workers = []
    if importlib.util.find_spec("xdist") is not None:
        workers = ["-n", str(min(8, os.cpu_count() or 1))]
    command = [sys.executable, "-m", "pytest", "-q", *workers, "--maxfail=20", "tests/ops"]
    if device == "cuda":
        command += ["tests/models/test_no_host_syncs.py", "-k", "cuda or gpu"]
    else:
        command += ["-k", "small and float64"]
    output = shell(*command, timeout=seconds, OMP_NUM_THREADS="1")
    return {"summary": output.strip().splitlines()[-1]}


def bad_labels(device: str, seconds: float) -> Report:
    """Checks that a bad label on the GPU is reported, is not counted, and stops nothing."""
    from mcibi_fast import ops

    if device == "cpu":
        return {"skipped": "needs a GPU"}
    features = torch.ones(1, 8, 4, 4, device="cuda")
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8, device="cuda")
    labels[0, 3, 5] = 200
    _, counts = ops.class_feature_sums(features, labels, 19)
    if counts.sum().item() != 63:
        raise RuntimeError(f"the bad label was counted: {counts.tolist()}")
    try:
        ops.check_labels()
    except ValueError as error:
        ops.check_labels()  # the flag was cleared
        return {"message": str(error)}
    raise RuntimeError("check_labels() did not raise")


def small_run(device: str, seconds: float) -> Report:
    """Runs every op once forward and backward on small inputs, for the sanitizer."""
    from tests.ops.table import CASES
    from tests.ops.test_all_ops import cotangent_for, with_gradient

    small = [c for c in CASES if c.note.startswith(("small", "prime"))]
    cases = [c for c in small if c.args()[0].device.type == device]
    cases += [split_keys()] if device == "cuda" else []
    for case in cases:
        print(case, flush=True)
        cotangent = cotangent_for(case, case.args()) if case.differentiable else None
        for dtype in DTYPES:
            for layout in ("contiguous", "strided"):
                args = case.args(dtype, layout)
                if cotangent is None:
                    case.call(*args)
                else:
                    with_gradient(case, args, cotangent)
    if device == "cuda":
        torch.cuda.synchronize()
    return {"cases": len(cases)}


# Parts of the names of our kernels, which alone are watched: those of nvcc are in a namespace.
KERNELS = (
    *("mcibi_fast", "_gradient_kernel", "_forward_kernel", "_join_kernel"),
    *("_delta_kernel", "_softmax_kernel", "_count_kernel"),
)


def sanitizer(device: str, seconds: float) -> Report:
    """Runs compute-sanitizer's memcheck and racecheck on our kernels in ``small_run``."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if program is None or device == "cpu":
        return {"skipped": "needs compute-sanitizer and a GPU"}
    usage = shell(program, "--help", timeout=20)
    option = next((o for o in ("--kernel-regex", "--kernel-name") if o in usage), None)
    filters = [f"{option}=kns={name}" for name in KERNELS] if option else []
    verdicts: Report = {"failed": 0, "filter": option}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        # PyTorch makes some calls that may fail and handles that: API errors do not count.
        common = ["--error-exitcode", "9", "--report-api-errors", "no", *filters]
        runs = {}
        for tool in ("memcheck", "racecheck"):
            watched = [sys.executable, "-m", "benchmarks.gpu_stages", "small_run"]
            watched += [f"{folder}/{tool}.json", "--seconds", str(seconds)]
            runs[tool] = pool.submit(
                shell,
                *(program, "--tool", tool, *common, *watched),
                timeout=0.9 * seconds,
                # Otherwise an access past a tensor would stay inside a cached block.
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )
        for tool, run in runs.items():
            try:
                run.result()
            except RuntimeError as error:
                verdicts[tool] = str(error)
                # Other failures, such as an unsupported device, do not mean an error of ours.
                found = "failed (9)" in str(error) and "Device not supported" not in str(error)
                verdicts["failed"] += int(found)
            else:
                verdicts[tool] = "no errors"
    return verdicts


def training(device: str, seconds: float) -> Report:
    """Trains the demo: both models, one seed."""
    command = [sys.executable, "-m", "mcibi_fast.cli", "demo", "--quiet", "--set"]
    if device == "cpu":
        command += ["epochs=1", "data.train_count=16", "data.val_count=4", "data.size=[64,64]"]
    else:
        command += ["workers=6"]  # drawing scenes takes longer than training on them
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output = shell(*command, "--out", folder, timeout=seconds)
    return {"seconds": round(time.monotonic() - start, 1), "table": output[-2000:]}


# ---- speed -------------------------------------------------------------------


BRIEF = 0.3  # seconds for timing each candidate of a case


def speed(kind: str, device: str, seconds: float, options: argparse.Namespace) -> Report:
    """Runs benchmarks one after another; their results are written after each case.

    Args:
        kind: "ours" times our kernels alone, the others compare and time all candidates.
        device: on the CPU, small sizes.
        seconds: for all of them. One that takes far longer than its share, as a kernel that hangs
            does, ends the process; ``begun`` in the report says where.
        options: those of the command line.
    """
    end = time.monotonic() + 0.95 * seconds
    report: Report = {"begun": [], "failed": 0, "failures": [], "left_out": 0, "files": []}
    harness.survive_failures(options.results)
    harness.time_briefly(BRIEF, alone=kind == "ours")
    for done, name in enumerate(options.benchmarks):
        report["begun"].append(name)
        write(options.result, report)
        share = 1.5 * (end - time.monotonic()) / (len(options.benchmarks) - done)
        # On the CPU the first case of each is enough to try the way through.
        harness.stop_after(1.0 if device == "cpu" else 0.9 * min(share, end - time.monotonic()))
        faulthandler.dump_traceback_later(max(share, 5) + 10, exit=True)
        try:
            _add_results(report, _benchmark(name, device, share), options.results)
        except Exception as error:
            report["failed"] += 1
            report["failures"].append(f"{name}: {type(error).__name__}: {error}"[:1000])
            if device == "cuda":
                torch.cuda.synchronize()  # after a wrong access nothing else can run here
    faulthandler.cancel_dump_traceback_later()
    return report


def _benchmark(name: str, device: str, seconds: float) -> list[results.Result]:
    if name == "table7_contexts":  # in float32 without TF32
        torch.backends.cudnn.allow_tf32 = False
        size, update_size = (128, 64) if device == "cuda" else (8, 8)
        table7 = importlib.import_module("benchmarks.table7_contexts")
        return table7.run(device, size, update_size, budget=seconds / 8)
    return importlib.import_module(f"benchmarks.{name}").run(device, device == "cpu")


def _add_results(report: Report, found: list[results.Result], folder: Path) -> None:
    """Writes the results; the report has the failures and the number of cases left out."""
    for result in found:
        report["files"].append(results.write(result, folder).name)
        report["left_out"] += result["cases_left_out"]
        report["failures"] += result["failures"]
        ours = [line for line in result["failures"] if not line.startswith(harness.DROPPED)]
        report["failed"] += len(ours)


STAGES: dict[str, Callable[[str, float], Report]] = {
    stage.__name__: stage
    for stage in (
        environment,
        build,
        matrix_instructions,
        tests,
        hot_path,
        bad_labels,
        small_run,
        sanitizer,
        training,
    )
}


def write(file: Path, report: Report) -> None:
    """Writes a stage's report, or the part of it that is known so far."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"ok": not report.get("failed")} | report, default=str))
    partial.replace(file)


def main() -> int:
    """Runs one stage and writes its result; exit status 1 if it failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a stage, accuracy_OP, ours, peers or whole")
    parser.add_argument("result", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--benchmarks", nargs="+", default=[], help="modules, for the last three")
    parser.add_argument(
        "--results", type=Path, default=results.RESULTS, help="folder for results of benchmarks"
    )
    options = parser.parse_args()
    result: Report = {}
    try:
        if options.name.startswith("accuracy_"):
            op = options.name.removeprefix("accuracy_")
            rows = gpu_accuracy.compare(op, options.device, 0.9 * options.seconds)
            for found in rows:
                write(options.result, found)
        elif options.name in STAGES:
            found = STAGES[options.name](options.device, options.seconds)
        else:
            kind = options.name.partition("_")[0]
            found = speed(kind, options.device, options.seconds, options)
        result = {"ok": not found.get("failed"), **found}
    except Exception as error:
        if options.result.is_file():  # the part that was known
            result = json.loads(options.result.read_text())
        result |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:4000]}
        result["traceback"] = traceback.format_exc()[-3000:]
    write(options.result, result | {"done": True})
    return int(not result["ok"])


if __name__ == "__main__":
    sys.exit(main())
