"""The tests of the CPU kernels in processes that use plainer instructions than this CPU's best."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcibi_fast import _build

if _build.load_extensions()["cpu"] is not None:
    pytest.skip(f"needs _cpu: {_build.load_extensions()['cpu']}", allow_module_level=True)

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("flavour", ["baseline", "v3"])
def test_every_instruction_set(flavour: str) -> None:
    built, best = _build.build_info()["cpu_flavours"], _build.build_info()["cpu_flavour"]
    if flavour not in built or built.index(flavour) >= built.index(best):
        pytest.skip(f"needs a build with {flavour}, on a CPU above it; the best here is {best}")
    files = sorted(FOLDER.glob("test_*_cpu.py"))
    assert len(files) == 5
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        cwd=FOLDER.parents[1],
        env={**os.environ, "MCIBI_FAST_CPU": flavour},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]
