"""The table of inference stages: the paper's trade-off, and what W and O are measured."""

from __future__ import annotations

import pytest

from benchmarks.results import table
from benchmarks.table6_stages import stage_cost, table6
from mcibi_fast import models
from mcibi_fast.data import Scenes


def test_rows() -> None:
    dataset = Scenes("val", count=2, size=(32, 32), seed=0)
    model = models.create(
        "fcn_mcibipp", len(dataset.classes), "test_resnet", feats_channels=16, transform_channels=8
    ).eval()
    rows = table6(model, dataset, "cpu", budget=0.01)
    assert [(row["mixing"], row["stage"]) for row in rows] == [
        (mixing, stage) for mixing in ("paper", "released") for stage in (1, 2, 3, 4)
    ]
    assert all(row["ms"] > 0 and 0 <= row["W_accuracy"] <= 100 for row in rows)
    assert "trade_off" in table(rows, digits=3)


@pytest.mark.slow
def test_cost_of_a_stage() -> None:
    rows = stage_cost("cpu", budget=0.01, size=32, num_classes=5, backbone="test_resnet")
    assert [(row["form"], row["folded"]) for row in rows] == [
        ("paper", "no"),
        ("paper", "yes"),
        ("released", "no"),
        ("released", "yes"),
    ]
