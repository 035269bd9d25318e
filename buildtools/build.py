"""Builds the compiled parts into a package folder; records what was built and why other parts not.

``python -m buildtools.build`` builds into the checkout, without setuptools.

Environment: MCIBI_FAST_CUDA=1 makes a CUDA part that cannot be built an error, =0 leaves it out;
MCIBI_FAST_CUDA_ARCHS (or TORCH_CUDA_ARCH_LIST) chooses its architectures; MCIBI_FAST_CPU=0 takes
the CPU part that an earlier build left in the checkout; CXX, CUDA_HOME and MAX_JOBS are read as
usual.

Both parts depend on neither Python nor the version of torch (2.10 and newer), so they can be built
on one machine and copied to another together with the record: the files belong in `mcibi_fast/`.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any

from buildtools import op_header, plan, toolchain
from buildtools.toolchain import Torch, Unavailable

RECORD = "_build_record.json"


def build(root: Path, out: Path, temp: Path) -> dict[str, Any]:
    """Builds _cpu.so and _cuda.so into `out` with a record, which is printed and returned."""
    temp.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    version = runpy.run_path(str(root / "mcibi_fast" / "version.py"))["__version__"]
    torch = toolchain.find_torch()
    record: dict[str, Any] = {"version": version, "torch": torch.version}
    record["torch_target"] = toolchain.TORCH_TARGET
    record["schemas"] = op_header.table(root)["DIGEST"]
    record["cpu"] = _build_cpu(root, out, temp, torch, record)
    record["cuda"] = _build_cuda(root, out, temp, torch)
    if os.environ.get("MCIBI_FAST_CUDA") == "1" and not record["cuda"]["built"]:
        raise SystemExit(f"mcibi_fast: MCIBI_FAST_CUDA=1, but {record['cuda']['reason']}")
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    print(describe(record), flush=True)
    return record


def _build_cpu(
    root: Path, out: Path, temp: Path, torch: Torch, record: dict[str, Any]
) -> dict[str, Any]:
    """Builds the CPU part; without a compiler or headers, the record says what is missing."""
    if os.environ.get("MCIBI_FAST_CPU") == "0":
        return _earlier_cpu(root, out, record)
    try:
        cxx = toolchain.find_cxx(torch.include)
    except Unavailable as error:
        _remove(out, "_cpu.so")
        return {"built": False, "reason": str(error)}
    steps = plan.cpu_plan(root, out, temp, cxx, torch)
    try:
        plan.run(steps, temp, "cpu", _jobs())
    except plan.BuildFailed as error:
        raise SystemExit(
            "mcibi_fast: the C++ part did not compile; see the errors above"
        ) from error
    return {
        "built": True,
        "compiler": cxx.description,
        "flavours": list(toolchain.cpu_flavours()),
    }


def _earlier_cpu(root: Path, out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The CPU part of the checkout's earlier build, if its operators were the same."""
    library, path = root / "mcibi_fast" / "_cpu.so", root / "mcibi_fast" / RECORD
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    if all(earlier.get(key) == record[key] for key in ("version", "schemas")):
        if library.is_file() and library.parent != out:
            shutil.copy2(library, out)
        return earlier["cpu"]
    return {"built": False, "reason": "MCIBI_FAST_CPU=0"}


def _build_cuda(root: Path, out: Path, temp: Path, torch: Torch) -> dict[str, Any]:
    """Builds the CUDA part; if that fails, it is left out and the record says why."""
    try:
        if os.environ.get("MCIBI_FAST_CUDA") == "0":
            raise Unavailable("MCIBI_FAST_CUDA=0")
        cxx = toolchain.find_cxx(torch.include)
        cuda = toolchain.find_cuda()
        plan.run(plan.cuda_plan(root, out, temp, cxx, torch, cuda), temp, "cuda", _jobs())
    except (Unavailable, plan.BuildFailed) as error:
        _remove(out, "_cuda.so")
        reason = str(error)
        if isinstance(error, plan.BuildFailed):
            reason = "it did not compile: " + _first_error(reason)
        return {"built": False, "reason": reason}
    return {
        "built": True,
        "nvcc": cuda.nvcc,
        "toolkit": cuda.version,
        "archs": cuda.archs,
        "notes": cuda.notes,
        "sources": plan.cuda_digest(root),
    }


def describe(record: dict[str, Any]) -> str:
    lines = [
        f"mcibi_fast {record['version']}, built against torch {record['torch']} "
        f"(stable ABI: runs with {record['torch_target']} and newer)"
    ]
    cpu, cuda = record["cpu"], record["cuda"]
    if cpu["built"]:
        lines.append(f"  cpu   built      {', '.join(cpu['flavours'])}; {cpu['compiler']}")
    else:
        lines.append(f"  cpu   NOT built  {cpu['reason']}")
    if cuda["built"]:
        notes = "".join(f"; {note}" for note in cuda["notes"])
        lines.append(f"  cuda  built      {' '.join(cuda['archs'])}; nvcc {cuda['toolkit']}{notes}")
    else:
        lines.append(f"  cuda  NOT built  {cuda['reason']}")
    if not cpu["built"]:
        lines.append("  The package also works without them, in plain PyTorch, but more slowly.")
    return "\n".join(lines)


def _first_error(output: str) -> str:
    errors = [line.strip() for line in output.splitlines() if "error" in line or "fatal" in line]
    return errors[0] if errors else output[-300:]


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def _remove(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)


if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    build(checkout, checkout / "mcibi_fast", checkout / "build" / "temp")
