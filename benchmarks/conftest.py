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
    parser.addoption("--only", metavar="NAME", help="run only this one, such as memory_update")


def scripts(only: str | None) -> list[ModuleType]:
    """The modules of all benchmarks, or of the one that ``only`` names."""
    names = sorted(p.stem for p in Path(__file__).parent.glob(f"bench_{only or '*'}.py"))
    if not names:
        raise pytest.UsageError(f"--only: there is no benchmark {only!r}")
    return [importlib.import_module(f"benchmarks.{name}") for name in names]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per case and candidate; cases are made here to list them, and again to run them."""
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
