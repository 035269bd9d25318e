"""The quick cases as tests of pytest-benchmark: ``pytest benchmarks/``.

Its table has one group per case with the reference, eager PyTorch and ours side by side. As in the
scripts, a case whose results disagree is not timed; unlike there, the candidates are timed one
after another, so trust the scripts' ratios on a machine that is busy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.conftest import DEVICE
from benchmarks.harness import Case, check

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")


@functools.lru_cache(maxsize=1)
def checked(make: Callable[[], Case]) -> Case:
    """One case in memory at a time; its candidates' tests follow each other."""
    case = make()
    check(case)
    return case


@pytest.mark.benchmark(min_rounds=3, max_time=0.5, warmup=False)
def test_speed(benchmark: Any, make: Callable[[], Case], case_name: str, candidate: str) -> None:
    case = checked(make)
    run = next(c.run for c in (*case.parts, *case.candidates) if c.name == candidate)
    benchmark.group = case_name
    benchmark.name = candidate

    def finished() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    finished()  # modules load, code is compiled
    benchmark(finished)
