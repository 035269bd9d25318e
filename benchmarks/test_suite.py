"""The quick cases as tests of pytest-benchmark: ``pytest benchmarks/``.

The table has one group per case, with the reference, eager PyTorch and ours side by side. As in the
scripts, a case whose results disagree is not timed. Unlike in the scripts, the candidates are timed
one after another, so on a busy machine only the ratios of the scripts can be trusted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import Case, check
from benchmarks.conftest import DEVICE

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")


@functools.lru_cache(maxsize=1)
def checked(make: Callable[[], Case]) -> Case:
    """The case after its check; only one is kept in memory, as a case's tests run in a row."""
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

    finished()  # loads modules and compiles code
    benchmark(finished)
