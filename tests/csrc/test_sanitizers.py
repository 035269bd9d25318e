"""The CPU kernels under AddressSanitizer and UBSan, on the table of all ops."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from buildtools import plan, toolchain
from mcibi_fast import _build

ROOT = Path(__file__).resolve().parents[2]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

pytestmark = pytest.mark.slow
if _build.load_extensions()["cpu"] is not None:
    pytest.skip(f"needs _cpu: {_build.load_extensions()['cpu']}", allow_module_level=True)


def preloaded() -> str:
    """The runtime of AddressSanitizer, which must be there before the first allocation."""
    command = shutil.which("g++")
    if command is None:
        pytest.skip("needs g++ with its sanitizers")
    found = subprocess.run(
        [command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_file():
        pytest.skip("needs libasan, which comes with g++")
    return found


def build(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Builds _cpu with the sanitizers and the instructions that run here, little optimised."""
    flavours = toolchain.cpu_flavours()
    flags = flavours[_build.build_info()["cpu_flavour"]]
    monkeypatch.setattr(toolchain, "cpu_flavours", lambda: {"baseline": [*flags, "-O1", "-g1"]})
    folder.mkdir(parents=True, exist_ok=True)
    cxx = toolchain.Cxx(["g++", *SANITIZE], "")
    steps = plan.cpu_plan(root, folder, folder, cxx, toolchain.find_torch())
    plan.run(steps, folder, "sanitized", jobs=2)
    return folder / "_cpu.so"


def run(library: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.csrc.sanitized_worker", str(library)],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": preloaded(),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python leaks at exit
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        capture_output=True,
        text=True,
    )


def test_no_kernel_reads_or_writes_out_of_bounds(
    compile_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preloaded()
    result = run(build(ROOT, compile_cache / "sanitized", monkeypatch))
    assert result.returncode == 0, result.stderr[:4000]  # its report comes first
    found = re.fullmatch(r"(\d+) cases\n", result.stdout)
    assert found and int(found[1]) > 300, result.stdout
