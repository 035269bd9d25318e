"""The average of the weights: what it holds, and that it is what is evaluated and saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mcibi_fast import models
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.training.ema import WeightAverage
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import train


def test_parameters_are_averaged_and_buffers_copied() -> None:
    with torch.random.fork_rng(devices=[]):
        model = models.create("fcn_mcibipp", 3, backbone="test_resnet", feats_channels=8)
    average = WeightAverage(model, 0.9)
    name, parameter = next(iter(model.named_parameters()))
    expected = parameter.detach().clone()
    for step in (1, 2, 3):
        with torch.no_grad():
            parameter += step
            model.memory.memory[:, 0] = step
            model.memory.noise_state[1] = step
        average.update(model)
        expected = 0.9 * expected + 0.1 * parameter.detach()
        own = average.model.get_parameter(name)
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
        assert not own.requires_grad
        assert torch.equal(average.model.memory.memory, model.memory.memory)
        assert torch.equal(average.model.memory.noise_state, model.memory.noise_state)
    assert not average.model.training and model.training


def test_the_average_is_evaluated_and_saved(tiny_config: Callable, tmp_path: Path) -> None:
    seed_global_generators(0)
    config = tiny_config("ema=0.5")
    result = train(config, tmp_path, progress=False, report=lambda line: None)
    averaged, spec = load_model(tmp_path / "checkpoints" / "last")
    raw = Run(tmp_path).load_state()[1]["weights"]
    state = averaged.state_dict()
    differing = {name for name in state if not torch.equal(state[name], raw[name])}
    assert differing == {name for name, _ in averaged.named_parameters()}
    metrics = evaluate(averaged, config.data.dataset("val")).compute()
    assert metrics.as_dict(spec.classes) == result.metrics


@pytest.mark.parametrize("decay", [1.5, 1, -0.1, "NaN"])
def test_a_decay_that_makes_no_sense(tiny_config: Callable, decay: object) -> None:
    with pytest.raises(ValueError, match="ema: expected a decay of at least 0, less than 1"):
        tiny_config(f"ema={decay}").validate()
