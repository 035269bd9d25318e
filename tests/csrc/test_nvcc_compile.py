"""nvcc compiles every CUDA source for sm_80 and sm_90, within the budgets of registers, spills and
shared memory in nvcc_budgets.json.

A compiler version or a source without a row there fails and prints the row to add.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from buildtools.plan import NVCC_FLAGS
from buildtools.toolchain import Unavailable, find_cuda

CSRC = Path(__file__).resolve().parents[2] / "csrc"
BUDGETS = Path(__file__).with_name("nvcc_budgets.json")
SOURCES = sorted(CSRC.glob("*/cuda.cu"))

pytestmark = pytest.mark.slow

Figures = dict[str, dict[str, int]]  # kernel -> registers, spill_bytes, shared_bytes


@pytest.fixture(scope="module")
def nvcc() -> tuple[str, str]:
    """The compiler and its version."""
    try:
        cuda = find_cuda()
    except Unavailable as error:
        pytest.skip(f"needs nvcc: {error}")
    return cuda.nvcc, cuda.version


def _compile(cache: Path, nvcc: str, source: Path, arch: str) -> str:
    """What ptxas says; kept by the content of all CUDA sources."""
    flags = [flag for flag in NVCC_FLAGS if "fPIC" not in flag and flag != "-Xcompiler"]
    command = [nvcc, *flags, "-cubin", f"-arch={arch}", "-Xptxas", "-v", f"-I{CSRC}", str(source)]
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")]
    content = b"".join(path.read_bytes() for path in [source, *sorted(headers)])
    key = hashlib.sha256(content + repr(command).encode()).hexdigest()[:20]
    log = cache / f"nvcc-{source.parent.name}-{arch}-{key}.log"
    if not log.exists():
        done = subprocess.run(
            [*command, "-o", str(log.with_suffix(".cubin"))], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        log.write_text(done.stderr)
    return log.read_text()


def _figures(log: str) -> Figures:
    """The largest figures among each kernel template's instances."""
    kernel = re.compile(
        r"Compiling entry function '(\w+)'[^\n]*\n[^\n]*\n"
        r"\s*\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r"[^\n]*Used (\d+) registers([^\n]*)"
    )
    figures: Figures = {}
    for mangled, stores, loads, registers, rest in kernel.findall(log):
        name = _plain_name(mangled)
        shared = re.search(r"(\d+) bytes smem", rest)
        found = {
            "registers": int(registers),
            "spill_bytes": int(stores) + int(loads),
            "shared_bytes": int(shared.group(1)) if shared else 0,
        }
        before = figures.setdefault(name, found)
        figures[name] = {key: max(before[key], found[key]) for key in found}
    return figures


def _plain_name(mangled: str) -> str:
    """The kernel's name; its float64 instances, far larger and not for speed, stand apart.

    In a mangled name every identifier stands behind its length, and `d` is double.
    """
    for length in re.finditer(r"\d+", mangled):
        end = length.end() + int(length.group())
        name = mangled[length.end() : end]
        if name.endswith("_kernel"):
            return f"{name} float64" if re.match(r"I\w?d", mangled[end:]) else name
    raise AssertionError(f"a kernel's name ends in _kernel, unlike {mangled}")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_budgets(compile_cache: Path, nvcc: tuple[str, str], source: Path, arch: str) -> None:
    path, version = nvcc
    figures = _figures(_compile(compile_cache, path, source, arch))
    assert figures, "no kernels"
    op = source.parent.name
    budgets = json.loads(BUDGETS.read_text()).get(version, {}).get(arch, {}).get(op)
    if budgets is None:
        row = json.dumps({version: {arch: {op: figures}}})
        pytest.fail(f"no budgets for nvcc {version} in {BUDGETS.name}; add {row}", pytrace=False)
    assert figures.keys() == budgets.keys()
    for name, found in figures.items():
        over = {key: n for key, n in found.items() if n > budgets[name][key]}
        assert not over, f"{name} on {arch} is above its budget {budgets[name]}: {found}"
