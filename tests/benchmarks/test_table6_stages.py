"""The table of inference stages: the paper's trade-off, and what W and O are measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks.table6_stages import gathering_logits, stage_cost, table, table6, trade_off
from mcibi_fast import models
from mcibi_fast.data import Scenes


def test_the_trade_off_is_the_papers() -> None:
    gains = trade_off([43.39, 43.74, 43.85, 43.91], [34.91, 49.33, 58.19, 74.72])
    assert gains[0] is None
    assert [round(gain, 3) for gain in gains[1:] if gain is not None] == [0.024, 0.012, 0.004]
    assert trade_off([1, 2, 3], [3, 3, 2]) == [None, None, None]


@pytest.mark.parametrize("mixing", ["paper", "released"])
@torch.no_grad()
def test_the_weights_are_those_that_the_stage_gathers_with(mixing: str) -> None:
    model = models.create(
        "fcn_mcibipp", 5, "test_resnet", feats_channels=16, transform_channels=8, mixing=mixing
    ).eval()
    images = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    seen = []
    gather = model.head.context.gather
    model.head.context.gather = lambda state, W: (seen.append(W), gather(state, W))[1]
    model(images, stages=4)
    recorded = list(seen)
    assert len(recorded) == 4
    for stage, weight_logits in enumerate(recorded, start=1):
        torch.testing.assert_close(gathering_logits(model, images, stage), weight_logits)


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
    assert "trade_off" in table(rows)


def test_cost_of_a_stage() -> None:
    rows = stage_cost("cpu", budget=0.01, size=32, num_classes=5, backbone="test_resnet")
    assert [(row["form"], row["folded"]) for row in rows] == [
        ("paper", "no"),
        ("paper", "yes"),
        ("released", "no"),
        ("released", "yes"),
    ]
