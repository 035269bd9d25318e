"""What knowing the classes of an image brings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import present_classes
from mcibi_fast.nn import GaussianMemory
from mcibi_fast.nn.context import DatasetLevelContext
from mcibi_fast.training.train import train
from tests.tiny_run import make_tiny_config


@pytest.mark.usefixtures("own_generator")
def test_scores_of_a_run(tmp_path: Path, monkeypatch, capsys) -> None:
    train(make_tiny_config("epochs=1"), tmp_path / "run", progress=False, report=lambda _: None)
    found = present_classes.scores(tmp_path / "run")
    # After three steps it predicts hardly more than one class: the right ones are news.
    assert 0 < found.trained < found.known < 100
    assert found.classes == 12 and 1 < found.present < 12
    monkeypatch.setattr(sys, "argv", ["present_classes", str(tmp_path / "run")])
    present_classes.main()
    assert capsys.readouterr().out == (
        f"run: as trained {found.trained:.2f}, classes known {found.known:.2f}; "
        f"{found.present:.1f} of 12 classes in an image\n"
    )


def test_the_context_does_not_say_where_a_class_is(generator: torch.Generator) -> None:
    """What its first lines say: C_bi stays the same if the other pixels' W change places."""
    K, Z, h, w = 5, 8, 6, 7
    context = DatasetLevelContext(GaussianMemory(K, Z), transform_channels=4).double().eval()
    R = torch.randn(2, Z, h, w, dtype=torch.float64, generator=generator)
    W = torch.randn(2, K, h, w, dtype=torch.float64, generator=generator)
    moved = W.flatten(2)[:, :, torch.randperm(h * w, generator=generator)].view_as(W)
    with torch.no_grad():
        C_bi = context.attend(context.project(R), W, R.shape[2:])
        assert C_bi.std() > 0.01
        torch.testing.assert_close(context.attend(context.project(R), moved, R.shape[2:]), C_bi)
