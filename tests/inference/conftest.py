"""Evaluations run in this process, one after another."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def alone(one_process: None) -> None:
    """Same bits as a subprocess with OMP_NUM_THREADS=1, and nothing of an earlier run."""
