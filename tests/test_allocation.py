"""Freed memory is kept by the commands that run models over and over."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mcibi_fast.allocation import _is_glibc

pytestmark = pytest.mark.skipif(not _is_glibc(), reason="needs glibc")

# Blocks from malloc itself, so that nothing else is allocated in between.
FAULTS = """
import ctypes, resource, sys
from mcibi_fast import cli
if sys.argv[1] == "command":
    cli.COMMANDS["train"].run = lambda args: 0
    assert cli.main(["train"]) == 0
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
sizes = [mib * 2**20 for mib in (1, 5, 20, 31) for _ in range(4)]
blocks = [None] * len(sizes)
def step():
    for i, size in enumerate(sizes):
        blocks[i] = libc.malloc(size)
        ctypes.memset(blocks[i], 1, size)
    for block in reversed(blocks):
        libc.free(block)
for _ in range(8):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 3)
"""


def faults(how: str, **environment: str) -> int:
    """Page faults of a step in a new process; a page has 4 KiB or more."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        capture_output=True,
        text=True,
        check=True,
        env=kept | environment,
    )
    return int(done.stdout.split()[-1])


def test_commands_keep_freed_memory() -> None:
    usual = faults("library")
    assert usual > 1000
    assert faults("command") < usual / 20
    # What the environment says stays.
    assert faults("command", MALLOC_TRIM_THRESHOLD_=str(2**17)) > usual / 2
