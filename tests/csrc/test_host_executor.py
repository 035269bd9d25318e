"""The C++ tests in csrc/testing, among them the host executor's own, under AddressSanitizer and
UBSan."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.csrc import host_kernels

pytestmark = pytest.mark.slow

TESTS = sorted(host_kernels.TESTING.glob("*_test.cpp"))


def _run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("source", TESTS, ids=lambda path: path.stem)
def test_cpp(compile_cache: Path, source: Path) -> None:
    done = _run(host_kernels.build_test(compile_cache, source))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("memory", ["static", "dynamic"])
def test_a_kernel_that_leaves_its_shared_memory_is_caught(compile_cache: Path, memory: str) -> None:
    program = host_kernels.build_test(compile_cache, host_kernels.TESTING / "executor_test.cpp")
    done = _run(program, memory)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "overflow_kernel" in done.stderr
