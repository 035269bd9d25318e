"""What every test may use: recorded data, small trainings, memory filled with NaN."""

from __future__ import annotations

import gzip
import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests import thinning

if TYPE_CHECKING:
    from mcibi_fast.recipes import TrainConfig

SHARED = Path(__file__).resolve().parents[2] / "shared"
RECORDED = Path(__file__).parent / "data" / "recorded"
LARGE = ("mcibipp_fcn.npz", "mcibipp_aspp.npz")  # recordings that are not in the repository


def pytest_report_header() -> str:
    which = "all" if thinning.ALL else "some stand for others; MCIBI_FAST_TESTS=all runs every one"
    return f"cases: {which}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=thinning.thin(items))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test starts from the same random numbers, whichever ran before it."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed costs a traceback
    random.seed(0)


@pytest.fixture
def heard_signals() -> Iterator[None]:
    """Signals that stop a command are heard; under nohup they are ignored, by commands as well."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Loads a file of inputs and outputs recorded from the released code, by its name."""

    def load(name: str) -> dict[str, np.ndarray]:
        path = (SHARED / "golden" if name in LARGE else RECORDED) / name
        if name in LARGE and not path.is_file():
            pytest.skip(f"needs {name}, recorded from the released code, in ../shared/golden")
        with np.load(path) as data:
            return dict(data)

    return load


def recorded_shapes() -> dict[str, dict[str, list[int]]]:
    with gzip.open(RECORDED / "released_state_dict_shapes.json.gz", "rt") as file:
        return json.load(file)


@pytest.fixture(scope="session")
def published_shapes() -> dict[str, dict[str, list[int]]]:
    """Keys and shapes of the checkpoints of the 13 published configurations, by their names."""
    configurations = recorded_shapes()
    assert len(configurations) == 13 and all(configurations.values())
    return configurations


@pytest.fixture(scope="session")
def camvid() -> Path:
    """The CamVid folder."""
    folder = SHARED / "camvid"
    if not folder.is_dir():
        pytest.skip("needs the CamVid images in ../shared/camvid")
    return folder


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., TrainConfig]:
    """A training of seconds; see `tiny_run`."""
    from tests.tiny_run import make_tiny_config

    return make_tiny_config


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills all new memory with NaN (integers: the largest), so nothing unwritten looks right."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1000).isnan().all(), "PyTorch no longer fills uninitialised memory"
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and none of what accelerate keeps of an earlier run; errors are one line."""
    from accelerate.state import AcceleratorState

    monkeypatch.delenv("MCIBI_FAST_DEBUG", raising=False)
    AcceleratorState._reset_state(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)


@pytest.fixture
def own_generator(one_process: None) -> Iterator[None]:
    """One process, whose global generator trainings and models leave as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with exit status 2 and one line; returns the line."""
    from mcibi_fast import cli

    def run(*arguments: object) -> str:
        capfd.readouterr()
        assert cli.main([*map(str, arguments)]) == 2
        err = capfd.readouterr().err
        assert err.startswith("mcibi-fast: error: ") and err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers of the test's own."""
    return torch.Generator().manual_seed(0)
