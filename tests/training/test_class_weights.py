"""Class weights: the formula, the split's histogram, and how they reach the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mcibi_fast.data import Scenes
from mcibi_fast.recipes import TrainConfig
from mcibi_fast.training.class_weights import balanced_weights, class_pixels
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import train
from mcibi_fast.training.trainer import Trainer


def test_the_formula() -> None:
    weights = balanced_weights(torch.tensor([60, 30, 10, 0]))
    share = np.array([0.6, 0.3, 0.1, 0.0])
    expected = 1 / np.log(1.02 + share)
    expected /= (share * expected).sum()
    np.testing.assert_allclose(weights, expected)
    assert sorted(weights) == weights  # the rarer the heavier
    with pytest.raises(ValueError, match="balanced, but no pixel of the split is labelled"):
        balanced_weights(torch.zeros(3))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_histogram_of_a_split(workers: int) -> None:
    data = Scenes("train", count=5, size=(24, 30), seed=0)
    pixels = class_pixels(data, Accelerator(cpu=True), workers=workers)
    labels = np.concatenate([data.read(i)[1].ravel() for i in range(5)])
    expected = np.bincount(labels[labels < 12], minlength=12)
    assert pixels.tolist() == expected.tolist()
    assert data.transform is None


def test_balanced_weights_are_in_the_runs_configuration(
    tiny_config: Callable, tmp_path: Path
) -> None:
    config = tiny_config("loss.class_weights=balanced", "epochs=1")
    seed_global_generators(0)
    train(config, tmp_path, progress=False, report=lambda line: None)
    assert config.loss.class_weights == "balanced"  # the caller's is left alone
    stored = TrainConfig.from_dict(Run(tmp_path).config())
    data = config.data.dataset("train")
    pixels = class_pixels(data, Accelerator(cpu=True))
    assert stored.loss.class_weights == pytest.approx(balanced_weights(pixels))


def test_the_losses_of_the_configuration_reach_the_heads(tiny_config: Callable) -> None:
    weights = [1.0] * 11 + [2.0]
    config = tiny_config(
        f"loss.class_weights={weights}", "loss.label_smoothing=0.1", "loss.ohem_threshold=0.7"
    )
    trainer = Trainer(config, Run("unused"))
    loss = trainer.model.head.loss
    assert loss.class_weights.tolist() == weights
    assert (loss.label_smoothing, loss.ohem_threshold) == (0.1, 0.7)
    assert not any("loss" in name for name in trainer.model.state_dict())
    trainer.close()


def test_the_wrong_number_of_weights(tiny_config: Callable) -> None:
    config = tiny_config("loss.class_weights=[1,2,3]")
    with pytest.raises(
        ValueError, match=r"loss\.class_weights: 3 weights, but the data has 12 classes"
    ):
        Trainer(config, Run("unused"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.class_weights=[1,-2]", "loss.class_weights: expected 0 or more, got -2"),
        ("loss.label_smoothing=1", "loss.label_smoothing: expected 0 or more, less than 1, got 1"),
        ("loss.ohem_threshold=0", "loss.ohem_threshold: expected above 0, at most 1, got 0"),
        ("loss.ohem_min_kept=0", "loss.ohem_min_kept: expected at least 1, got 0"),
    ],
)
def test_numbers_that_make_no_sense(tiny_config: Callable, setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(setting).validate()
