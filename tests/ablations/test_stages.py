"""Stages of inference: the weights they gather with, and the paper's trade-off."""

from __future__ import annotations

import pytest
import torch

from mcibi_fast import models
from mcibi_fast.ablations.stages import StageWeights, fastest, gathering_logits, trade_off
from mcibi_fast.models import Segmentor


def model(mixing: str, framework: str = "fcn") -> Segmentor:
    sizes = {"feats_channels": 16, "transform_channels": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        name = f"{framework}_mcibipp"
        return models.create(name, 5, "test_resnet", mixing=mixing, **sizes).eval()


def images() -> torch.Tensor:
    return torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def test_the_trade_off_is_the_papers() -> None:
    gains = trade_off([43.39, 43.74, 43.85, 43.91], [34.91, 49.33, 58.19, 74.72])
    assert gains[0] is None
    assert [round(gain, 3) for gain in gains[1:] if gain is not None] == [0.024, 0.012, 0.004]
    assert trade_off([1, 2, 3], [3, 3, 2]) == [None, None, None]


@pytest.mark.parametrize("framework", ["fcn", "pspnet"])
@pytest.mark.parametrize("mixing", ["paper", "released"])
@torch.no_grad()
def test_the_weights_are_those_that_the_stage_gathers_with(mixing: str, framework: str) -> None:
    network = model(mixing, framework)
    seen = []
    gather = network.head.context.gather
    network.head.context.gather = lambda state, W: (seen.append(W), gather(state, W))[1]
    network(images(), stages=4)
    recorded = list(seen)
    assert len(recorded) == 4
    for stage, weight_logits in enumerate(recorded, start=1):
        torch.testing.assert_close(gathering_logits(network, images(), stage), weight_logits)
        prediction = StageWeights(network, stage)(images()).logits
        torch.testing.assert_close(prediction, weight_logits.softmax(dim=1))


def test_every_stage_is_timed() -> None:
    assert all(seconds > 0 for seconds in fastest(model("paper"), images(), budget=0))
