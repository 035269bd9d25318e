"""Every part of a step gets its share of the time, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import bench_step
from mcibi_fast import models
from mcibi_fast.models.weights import Precision

KEYS = [f"{part}_ms" for part in (*bench_step.PARTS, "total")]


@pytest.mark.parametrize("memory", [None, "mcibipp"])
def test_parts(memory: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(bench_step.time, "thread_time", lambda: float(next(ticks)))
    variants: tuple[tuple[str, Precision], ...] = (("channels_last", "bf16"),)
    train, inference = bench_step.measure(
        "fcn", memory, "test_resnet", batch=2, size=32, variants=variants
    )
    assert (train["task"], inference["task"]) == ("train", "inference")
    for row in (train, inference):
        used = {part for part in bench_step.PARTS if row[f"{part}_ms"]}
        expected = {"backbone", "head", "loss"} | ({"ours"} if memory else set())
        assert used == expected | ({"optimizer"} if row is train else set())
        assert row["total_ms"] == sum(row[f"{part}_ms"] for part in bench_step.PARTS)
    # One tick for each node of the backward pass.
    assert train["backbone_ms"] > 10 * inference["backbone_ms"]


def test_the_backward_pass_goes_to_the_part_that_made_its_nodes() -> None:
    model = models.create("fcn", 3, "test_resnet", memory="mcibipp", feats_channels=8,
                          transform_channels=8)  # fmt: skip
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    with bench_step.watched(model.train()) as watch:
        losses = model(images, labels).losses
    owners = {}
    loss = torch.stack(list(losses.values())).sum()
    for node in bench_step._nodes(loss.grad_fn):
        if (number := node._sequence_nr()) < 1 << 62:
            owners.setdefault(watch.owner(number), set()).add(node.name())
    assert {"ConvolutionBackward0", "MaxPool2DWithIndicesBackward0"} <= owners["backbone"]
    assert any("UpsampleCrossEntropy" in name for name in owners["loss"])
    assert any("GaussianAggregate" in name for name in owners["ours"])
    assert "ConvolutionBackward0" in owners["head"]
    assert "forward" not in vars(model.backbone) and "update" not in vars(model.memory)
