"""``pytest benchmarks/`` times every candidate of a case; ``pytest`` alone does not collect it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_pytest(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    # A worker of xdist says so in the environment, and there nothing is timed.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_candidates_of_a_case_are_one_group() -> None:
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    only = ("--only", "gaussian_aggregate", "-k", "19")
    output = run_pytest("benchmarks", *only, "-p", "no:xdist")
    assert "benchmark 'gaussian_aggregate: K 19, Z 512, batch 1, map 64" in output
    table = output[output.index("Name (time") :]
    names = [line.split()[0] for line in table.splitlines() if "(" in line]
    assert {"reference", "eager", "ours"} <= set(names)
