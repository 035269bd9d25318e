"""The stages of `benchmarks.gpu_check`, each of which runs in its own process:
``python -m benchmarks.gpu_stages NAME REPORT.json --seconds S``.

A stage returns its findings, with "failed" above 0 if something is wrong, or raises an error. The
stages that are benchmarks write their results into the folder ``--results``. With ``--device cpu``
the stages that can run on a CPU do so at small sizes: this tests the stages, not the kernels.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.machine import ROOT

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "strided")
Report = dict[str, Any]


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
    """The environment of the results, with more about the GPU and the packages used."""
    from mcibi_fast.training import environment

    found: Report = environment.environment(device) | {"cores": os.cpu_count()}
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
    """Compiles the extension in place, for this GPU only."""
    options = {"MCIBI_FAST_CUDA": "0"}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        options = {"MCIBI_FAST_CUDA": "1", "MCIBI_FAST_CUDA_ARCHS": f"{major}.{minor}"}
    output = shell(sys.executable, "setup.py", "build_ext", "--inplace", timeout=seconds, **options)
    program = "import json, mcibi_fast; print(json.dumps(mcibi_fast.build_info(), default=str))"
    info = json.loads(shell(sys.executable, "-c", program, timeout=60).splitlines()[-1])
    if info["backends"][device] is not True:
        raise RuntimeError(
            f"the {device} part cannot be used: {info['backends'][device]}\n{output[-2000:]}"
        )
    return info


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


def paper_cases(device: str) -> list[Any]:
    """The ops with a gradient at the paper's sizes (C = 512, T = 256); on the CPU small cases."""
    from tests.ops import table

    if device == "cpu":
        prime = [case for case in table.CASES if case.note.startswith("prime")]
        return [case for case in prime if case.differentiable]
    return [
        table.sums_case((2, 512, 64, 64), (512, 512), 150, "sums-150"),
        table.update_case((2, 512, 64, 64), (512, 512), 19, "update-19"),
        table.update_case((1, 512, 97, 97), (769, 769), 150, "update-150-odd"),
        table.aggregate_case((2, 19, 64, 64), 512, "aggregate-19"),
        table.aggregate_case((1, 150, 97, 97), 512, "aggregate-150-odd", philox=True),
        table.attention_case(4096, 4096, 256, 256, "attention-256"),
        table.attention_case(1000, 1500, 512, 512, "attention-512"),
        table.cross_entropy_case((2, 150, 64, 64), (512, 512), "cross-entropy-150"),
        table.class_rank_case(2, 4096, 19, "class-rank-19"),
        table.class_rank_case(1, 97 * 97, 150, "class-rank-150-odd"),
        table.class_rank_case(1, 97 * 97, 150, "class-rank-150-hard", hard=True),
    ]


def backends(case: Any, dtype: torch.dtype) -> list[str]:
    """The backends that can run the case in this dtype (a Triton kernel has no float64)."""
    from mcibi_fast.ops.dispatch import _ops

    op = _ops[case.name]
    assert op.public is not None
    args = op.prepare(*case.args(dtype), **case.options)
    return [k.backend for k in op.kernels if k.backend != "reference" and not k.why_not(*args)]


def accuracy(device: str, seconds: float, partial: Path) -> Report:
    """Relative errors compared with float64, beside those of PyTorch in the same dtype."""
    rows: list[Report] = []
    report: Report = {}
    end = time.monotonic() + 0.8 * seconds
    cases = [c.on(device) for c in paper_cases(device)]
    for done, case in enumerate(cases):
        if time.monotonic() > end:
            break
        try:
            rows += _errors_of(case)
        except Exception as error:  # the other cases are still checked
            rows.append({"case": str(case), "ok": False, "error": f"{error}"[:1000]})
        failed = [r for r in rows if not r["ok"]]
        report = {"failed": len(failed), "checked": len(rows), "failures": failed[:5]}
        report |= {"not_reached": [str(c) for c in cases[done + 1 :]], "rows": rows}
        write(partial, report)
    return report


def _errors_of(case: Any) -> list[Report]:
    import mcibi_fast
    from tests.ops.test_all_ops import cotangent_for, error, with_gradient, yardstick

    rows = []
    cotangent = cotangent_for(case, case.args())
    with mcibi_fast.backend("reference"):
        truth = with_gradient(case, case.args(), cotangent)
    for dtype in DTYPES:
        for backend in backends(case, dtype):
            bars = [0.0] * len(truth)
            # As in the tests, the rounding of SDPA's own kernels counts as PyTorch's.
            for fused in (False, True) if backend == "sdpa" else (False,):
                results = yardstick(case, case.args(dtype), cotangent, fused)
                pairs = zip(bars, results, truth, strict=True)
                bars = [max(b, error(r, t)) for b, r, t in pairs]
            unit = torch.finfo(dtype).eps / 2
            for layout in LAYOUTS:
                with mcibi_fast.backend(backend):
                    got = with_gradient(case, case.args(dtype, layout), cotangent)
                errors = [error(r, t) for r, t in zip(got, truth, strict=True)]
                ok = all(e <= 2 * b + unit for e, b in zip(errors, bars, strict=True))
                rows.append(
                    {
                        "case": str(case),
                        "backend": backend,
                        "dtype": str(dtype).removeprefix("torch."),
                        "layout": layout,
                        "errors": errors,
                        "pytorch_errors": bars,
                        "ok": ok,
                    }
                )
    return rows


def hot_path(device: str, seconds: float) -> Report:
    """Checks that no op waits for the device and that each can be captured in a CUDA graph."""
    from tests.ops.table import SMALL

    if device == "cpu":
        return {"skipped": "needs a GPU"}
    verdicts, failed = {}, 0
    for case in (c for c in SMALL if c.note.endswith("-cuda")):
        try:
            verdicts[str(case)] = _captured(case)
        except Exception as error:
            verdicts[str(case)] = f"{type(error).__name__}: {error}"[:1000]
            failed += 1
    return {"failed": failed, **verdicts}


def _captured(case: Any) -> str:
    args = case.args(torch.bfloat16)
    expected = case.call(*args)  # this also warms up: modules are loaded, flags allocated
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.call(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.call(*args)
    captured.fill_(0)
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
    return "no sync, captured, equal bits"


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
    for case in cases:
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


def sanitizer(device: str, seconds: float) -> Report:
    """Runs compute-sanitizer's memcheck and racecheck on ``small_run``."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if program is None or device == "cpu":
        return {"skipped": "needs compute-sanitizer and a GPU"}
    verdicts: Report = {"failed": 0}
    with tempfile.TemporaryDirectory() as folder:
        for tool in ("memcheck", "racecheck"):
            watched = [sys.executable, "-m", "benchmarks.gpu_stages", "small_run"]
            watched += [f"{folder}/{tool}.json", "--seconds", str(seconds)]
            try:
                # PyTorch makes some calls that may fail and handles that: API errors do not count.
                shell(
                    *(program, "--tool", tool, "--error-exitcode", "9"),
                    *("--report-api-errors", "no", *watched),
                    timeout=seconds / 2,
                    # Otherwise an access past a tensor would stay inside a cached block.
                    PYTORCH_NO_CUDA_MEMORY_CACHING="1",
                )
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


def benchmark(module: str, device: str, seconds: float, folder: Path) -> Report:
    """Runs a benchmark, at full size on a GPU, and writes its results after each case."""
    from benchmarks import harness

    harness.stop_after(0.7 * seconds)
    harness.survive_failures(folder)
    run = importlib.import_module(f"benchmarks.{module}").run
    return _written(run(device, device == "cpu"), folder)


def table7(device: str, seconds: float, folder: Path) -> Report:
    """Measures Table 7 at its full size, in float32 without TF32."""
    from benchmarks import table7_contexts

    torch.backends.cudnn.allow_tf32 = False
    size, update_size = (128, 64) if device == "cuda" else (8, 8)
    run = table7_contexts.run(device, size, update_size, budget=seconds / 8)
    return _written(run, folder)


def _written(found: list[results.Result], folder: Path) -> Report:
    """Writes the results; the stage's report has only failures and the number of cases left out."""
    failures = [failure for result in found for failure in result["failures"]]
    return {
        "failed": len(failures),
        "failures": failures,
        "cases_left_out": sum(result["cases_left_out"] for result in found),
        "files": [results.write(result, folder).name for result in found],
    }


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
    file.write_text(json.dumps({"ok": not report.get("failed")} | report, default=str))


def main() -> int:
    """Runs one stage and writes its result; exit status 1 if it failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a stage, or the module of a benchmark")
    parser.add_argument("result", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--results", type=Path, default=results.RESULTS, help="folder for results of benchmarks"
    )
    options = parser.parse_args()
    result: Report
    try:
        if options.name == "accuracy":
            found = accuracy(options.device, options.seconds, options.result)
        elif options.name in STAGES:
            found = STAGES[options.name](options.device, options.seconds)
        elif options.name == "table7":
            found = table7(options.device, options.seconds, options.results)
        else:
            found = benchmark(options.name, options.device, options.seconds, options.results)
        result = {"ok": not found.get("failed"), **found}
    except Exception as error:
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:4000]}
        result["traceback"] = traceback.format_exc()[-3000:]
    write(options.result, result)
    return int(not result["ok"])


if __name__ == "__main__":
    sys.exit(main())
