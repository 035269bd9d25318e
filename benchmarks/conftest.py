"""``pytest benchmarks/``: the quick cases of every benchmark, through pytest-benchmark."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.machine import keep_freed_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


if DEVICE == "cpu":
    keep_freed_memory()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--only", metavar="NAME", help="this benchmark alone, such as memory_update")


def scripts(only: str | None) -> list[ModuleType]:
    """The benchmarks, by name."""
    names = sorted(p.stem for p in Path(__file__).parent.glob(f"bench_{only or '*'}.py"))
    if not names:
        raise pytest.UsageError(f"--only: there is no benchmark {only!r}")
    return [importlib.import_module(f"benchmarks.{name}") for name in names]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per case and candidate; a case is made here for its names and made again to run."""
    if {"make", "candidate"} <= set(metafunc.fixturenames):
        params = []
        for script in scripts(metafunc.config.getoption("--only")):
            for make in script.cases(DEVICE, True):
                case = make()
                names = [c.name for c in (*case.parts, *case.candidates)]
                params += [
                    pytest.param(make, str(case), name, id=f"{case}-{name}") for name in names
                ]
        metafunc.parametrize(("make", "case_name", "candidate"), params)
