"""`mcibi-fast models`: every framework in one table."""

from __future__ import annotations

import pytest
import torch

from mcibi_fast import cli, models
from mcibi_fast.models.overview import overview


@pytest.mark.slow
def test_every_framework_has_a_line() -> None:
    header, *lines = overview(5, "test_resnet", size=64).splitlines()
    assert [line.split()[0] for line in lines] == models.frameworks()
    assert header.split()[:4] == ["name", "title", "source", "context"]
    line = next(line for line in lines if line.startswith("fcn "))
    model = models.create("fcn", 5, "test_resnet")
    joint = models.create("fcn", 5, "test_resnet", memory="mcibipp")
    millions = [f"{sum(p.numel() for p in m.parameters()) / 1e6:.1f}" for m in (model, joint)]
    words = line.split()
    assert words[:4] == ["fcn", "FCN", "arXiv", "1411.4038"]
    assert [words[-5], words[-2]] == millions and words[-3] == "yes"
    assert 0 < float(words[-4]) < float(words[-1])


def test_multiply_adds_of_a_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    """FCN's head by hand: 3x3 from 64 to 512 channels and 1x1 to 5 classes, at 8 x 8 pixels."""
    from mcibi_fast.models.overview import head_counts

    features = [torch.zeros(1, c, 8, 8, device="meta") for c in (16, 64)]
    counts = head_counts("fcn", 5, [16, 64], features, auxiliary_weight=0.0)
    assert counts.true == 64 * (9 * 64 * 512 + 512 * 5)
    assert counts.parameters == 9 * 64 * 512 + 2 * 512 + 512 * 5 + 5
    for wrong, message in (
        (["--classes", "0"], "classes: expected at least 1"),
        (["--memory", "brain"], "memory: no memory 'brain'"),
        (["--backbone", "resnot"], "resnot"),
    ):
        assert cli.main(["models", *wrong]) == 2
        assert message in capsys.readouterr().err
