"""``speed.compile``: the same training, with the memory's update in the graph, and resumable."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from mcibi_fast import models
from mcibi_fast.models import compilation
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.training.run import Run
from mcibi_fast.training.train import train
from tests.tiny_run import make_tiny_config

SETTINGS = ("model.options.dropout=0.0", "checkpoint_every=0")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, own_generator: None) -> Iterator[None]:
    """The backend that traces forward and backward, but generates no code."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(config: TrainConfig, out: Path, lines: list[str], *, resume: bool = False) -> None:
    torch.manual_seed(0)
    train(config, out, resume=resume, progress=False, report=lines.append)


@pytest.mark.slow
def test_trains_alike_with_two_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backbone and head are compiled once each; nothing is compiled for memory or evaluations.

    A run that is stopped and resumed ends with the same weights, bit for bit.
    """
    lines: list[str] = []
    plain = make_tiny_config(*SETTINGS, "ema=0.9", "model.options.init=pixel")
    run(plain, tmp_path / "plain", [])
    compiled = make_tiny_config(
        *SETTINGS, "ema=0.9", "model.options.init=pixel", "speed.compile=true"
    )
    run(compiled, tmp_path / "compiled", lines)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 3 and not counters["graph_break"]  # with the one that tries the compiler
    told = [line for line in lines if line.startswith("compiled in ")]
    assert len(told) == 1 and re.fullmatch(r"compiled in [\d.]+ s", told[0])
    expected, found = (
        models.checkpoint.load_model(tmp_path / name)[0].state_dict()
        for name in ("plain", "compiled")
    )
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    with monkeypatch.context() as stop, pytest.raises(KeyboardInterrupt):
        stop.setattr("mcibi_fast.training.trainer.Trainer._agree", lambda self, _: self.step == 4)
        run(compiled, tmp_path / "resumed", [])
    run(Run(tmp_path / "resumed").settings(), tmp_path / "resumed", [], resume=True)
    whole, resumed = (Run(tmp_path / name).weights() for name in ("compiled", "resumed"))
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_machine_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: no C++ compiler found\n\nand more lines")

    monkeypatch.setattr(torch, "compile", fails)
    compilation._check_compiler.cache_clear()
    with pytest.raises(ValueError) as caught:
        run(make_tiny_config("speed.compile=true"), tmp_path, [])
    assert re.fullmatch(
        r"compile: torch.compile does not work on this machine \(InvalidCxxCompiler: no C\+\+ "
        r"compiler found\); it needs a C\+\+ compiler and Python's headers; .*do not compile",
        str(caught.value),
    )
