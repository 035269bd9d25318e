"""Starts a worker script as the two ranks of one run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def two_ranks(worker: Path, *arguments: Path) -> Iterator[None]:
    """Runs ``worker RANK 2 ARGUMENTS`` for both ranks beside the body, then waits for them.

    Raises:
        AssertionError: one of them failed; with what it printed.
    """
    path = os.pathsep.join([str(ROOT), *sys.path])
    processes = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), "2", *arguments],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        yield
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
