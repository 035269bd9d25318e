"""One process and one thread; which runs are trained; commands that must fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mcibi_fast import cli
from mcibi_fast.ablations import runs


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from accelerate.state import AcceleratorState

    monkeypatch.delenv("MCIBI_FAST_DEBUG", raising=False)
    AcceleratorState._reset_state(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that training was called for."""
    names: list[str] = []
    train = runs.train

    def noted(config: object, out: Path, **options: object) -> object:
        names.append(out.name + (" resumed" if options["resume"] else ""))
        return train(config, out, **options)

    monkeypatch.setattr(runs, "train", noted)
    return names


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with exit status 2 and one line; returns the line."""

    def run(*command: str) -> str:
        capfd.readouterr()
        assert cli.main(list(command)) == 2
        err = capfd.readouterr().err
        assert err.startswith("mcibi-fast: error: ") and err.count("\n") == 1, err
        return err

    return run
