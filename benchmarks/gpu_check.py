"""Everything that only a GPU can show, in one command: ``python -m benchmarks.gpu_check``.

Builds the extension, runs the op tests, compares every op, dtype and layout at the paper's sizes
with a float64 reference, runs compute-sanitizer, looks for host syncs and captures CUDA graphs,
runs the benchmarks and a short training. Writes one JSON file with every figure and prints a
table. A stage that fails is reported, and the next one runs; the exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import platform
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

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "strided")

Report = dict[str, Any]


def shell(*command: str, timeout: int = 300) -> str:
    """Runs a command in the checkout and returns what it printed.

    Raises:
        RuntimeError: it failed; the message ends with what it printed last.
    """
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    output = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}):\n{output[-3000:]}")
    return output


def environment() -> Report:
    """GPU, versions and commit."""
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "memory_GiB": round(gpu.total_memory / 2**30, 1),
        "driver": shell(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ).strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit, with a mark if the checkout differs from it; "unknown" outside git."""
    try:
        return shell("git", "describe", "--always", "--dirty").strip()
    except (RuntimeError, FileNotFoundError):
        return "unknown"


def build() -> Report:
    """Compiles the extension in place."""
    output = shell(sys.executable, "setup.py", "build_ext", "--inplace", timeout=400)
    info = json.loads(
        shell(
            sys.executable,
            "-c",
            "import json, mcibi_fast; print(json.dumps(mcibi_fast.build_info(), default=str))",
        ).splitlines()[-1]
    )
    if info["backends"]["cuda"] is not True:
        raise RuntimeError(
            f"the CUDA part is not live: {info['backends']['cuda']}\n{output[-2000:]}"
        )
    return info


def matrix_instructions() -> Report:
    """The emulation of the matrix instructions that the tests rely on, against the hardware."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return {"skipped": "nvcc is not on the PATH"}
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/intrinsics_test"
        flags = ["-x", "cu", "-std=c++17", "-arch=native", "-Icsrc", "-o", program]
        shell(nvcc, *flags, "csrc/testing/intrinsics_test.cpp")
        return {"output": shell(program).strip()}


def tests() -> Report:
    """The tests of the ops and kernels, which include every op on CUDA when a GPU is there."""
    output = shell(
        sys.executable, "-m", "pytest", "-q", "-x", "tests/ops", "tests/kernels", timeout=400
    )
    return {"summary": output.strip().splitlines()[-1]}


def paper_cases() -> list[Any]:
    """The ops at the paper's sizes (C = 512, T = 256, output stride 8)."""
    from tests.ops import table

    return [
        table.sums_case((2, 512, 64, 64), (512, 512), 150, "sums-150"),
        table.update_case((2, 512, 64, 64), (512, 512), 19, "update-19"),
        table.update_case((1, 512, 97, 97), (769, 769), 150, "update-150-odd"),
        table.aggregate_case((2, 19, 64, 64), 512, "aggregate-19"),
        table.aggregate_case((1, 150, 97, 97), 512, "aggregate-150-odd", philox=True),
        table.attention_case(4096, 4096, 256, 256, "attention-256"),
        table.attention_case(1000, 1500, 512, 512, "attention-512"),
    ]


def accuracy() -> Report:
    """Relative errors against float64, beside PyTorch's own in the same dtype."""
    import mcibi_fast
    from tests.ops.test_all_ops import cotangent_for, error, with_gradient, yardstick

    rows: list[Report] = []
    for case in (c.on("cuda") for c in paper_cases()):
        cotangent = cotangent_for(case, case.args())
        with mcibi_fast.backend("reference"):
            truth = with_gradient(case, case.args(), cotangent)
        for dtype in DTYPES:
            bars = [
                error(r, t)
                for r, t in zip(yardstick(case, case.args(dtype), cotangent), truth, strict=True)
            ]
            for layout in LAYOUTS:
                for backend in case.backends():
                    with mcibi_fast.backend(backend):
                        got = with_gradient(case, case.args(dtype, layout), cotangent)
                    errors = [error(r, t) for r, t in zip(got, truth, strict=True)]
                    unit = torch.finfo(dtype).eps / 2
                    rows.append(
                        {
                            "case": str(case),
                            "backend": backend,
                            "dtype": str(dtype).removeprefix("torch."),
                            "layout": layout,
                            "errors": errors,
                            "pytorch_errors": bars,
                            "ok": all(e <= 2 * b + unit for e, b in zip(errors, bars, strict=True)),
                        }
                    )
        del truth
        torch.cuda.empty_cache()
    failed = [r for r in rows if not r["ok"]]
    return {"rows": rows, "failed": len(failed), "checked": len(rows)}


def small_run() -> None:
    """Every op forward and backward once on small inputs: what the sanitizer watches."""
    from tests.ops.table import CASES
    from tests.ops.test_all_ops import LAYOUTS as layouts
    from tests.ops.test_all_ops import cotangent_for, with_gradient

    for case in (c for c in CASES if c.note.endswith("-cuda")):
        for dtype in DTYPES:
            for layout in layouts:
                with_gradient(case, case.args(dtype, layout), cotangent_for(case, case.args()))
    torch.cuda.synchronize()


def sanitizer() -> Report:
    """compute-sanitizer's memcheck and racecheck over ``small_run``."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"skipped": "compute-sanitizer is not installed"}
    verdicts = {}
    for tool in ("memcheck", "racecheck"):
        run = [program, "--tool", tool, "--error-exitcode", "9", sys.executable]
        shell(*run, "-m", "benchmarks.gpu_check", "--small-run", timeout=240)
        verdicts[tool] = "no errors"
    return verdicts


def hot_path() -> Report:
    """No op waits for the device, and each can be captured into a CUDA graph."""
    from tests.ops.table import CASES

    verdicts = {}
    for case in (c for c in CASES if c.note in ("small-cuda", "small-philox-cuda")):
        args = case.args(torch.bfloat16)
        expected = case.call(*args)  # also the warm-up: modules load, flags are allocated
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.call(*args)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = case.call(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        captured.fill_(0)
        graph.replay()
        torch.testing.assert_close(captured, expected, rtol=0, atol=0)
        verdicts[str(case)] = "no sync, captured, equal bits"
    return verdicts


def bad_labels() -> Report:
    """A bad label on the GPU is flagged, contributes nothing, and stops nothing."""
    from mcibi_fast import ops

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


def benchmarks() -> Report:
    """The benchmark of each op, at full size."""
    from benchmarks import (
        bench_class_rank_attention,
        bench_confidence_attention,
        bench_gaussian_aggregate,
        bench_memory_update,
    )

    modules = (
        bench_memory_update,
        bench_gaussian_aggregate,
        bench_class_rank_attention,
        bench_confidence_attention,
    )
    return {m.__name__.rpartition(".")[2]: m.run(device="cuda", quick=False) for m in modules}


def training() -> Report:
    """The demo on the GPU: both models, one seed."""
    start = time.perf_counter()
    output = shell(sys.executable, "-m", "mcibi_fast.cli", "demo", "--out", "runs/gpu_check")
    return {"seconds": round(time.perf_counter() - start, 1), "table": output[-2000:]}


STAGES: tuple[Callable[[], Report], ...] = (
    environment,
    build,
    matrix_instructions,
    tests,
    accuracy,
    hot_path,
    bad_labels,
    sanitizer,
    benchmarks,
    training,
)


def main() -> int:
    """Runs the stages and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/GPU.json)")
    parser.add_argument("--only", nargs="+", choices=[s.__name__ for s in STAGES])
    parser.add_argument("--small-run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device is visible; this script needs one", file=sys.stderr)
        return 2
    if options.small_run:
        small_run()
        return 0
    report: Report = {}
    for stage in STAGES:
        if options.only and stage.__name__ not in options.only:
            continue
        start = time.perf_counter()
        try:
            result: Report = {"ok": True, **stage()}
            result["ok"] = not result.get("failed")
        except Exception as error:  # a stage must not take the others with it
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            result["traceback"] = traceback.format_exc()[-3000:]
        result["stage_seconds"] = round(time.perf_counter() - start, 1)
        report[stage.__name__] = result
        print(
            f"{stage.__name__:<12} {'ok' if result['ok'] else 'FAILED'} "
            f"{result['stage_seconds']:.1f} s  {result.get('error', '')[:2000]}",
            flush=True,
        )
        write(report, options.out)
    return int(not all(r["ok"] for r in report.values()))


def write(report: Report, path: Path | None) -> None:
    """Writes what there is so far, so that a machine that goes away takes little with it."""
    name = torch.cuda.get_device_name(0).replace(" ", "_")
    path = path or ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(main())
