"""Tiny runs: 32x32 scenes, a network of half a million weights, a handful of steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcibi_fast.recipes import (
    AugmentationConfig,
    ModelConfig,
    OptimizerConfig,
    ScenesData,
    TrainConfig,
    apply_settings,
)
from mcibi_fast.training.train import train


def make_tiny_config(*settings: str) -> TrainConfig:
    """Two epochs of three steps; dropout, fresh Philox noise and pixel initialisation are on."""
    config = TrainConfig(
        data=ScenesData(train_count=13, val_count=5, size=(40, 44)),
        model=ModelConfig(
            backbone="test_resnet",
            options={"feats_channels": 8, "transform_channels": 8, "form": "paper"},
        ),
        optimizer=OptimizerConfig(lr=0.01),
        augmentation=AugmentationConfig(crop_size=(32, 32)),
        epochs=2,
        batch_size=4,
        device="cpu",
        workers=0,
        log_every=2,
        checkpoint_every=2,
    )
    apply_settings(config, settings)
    return config


class Stopped(Exception):
    """What `stopped_after_one_epoch` ends a training with."""


def stopped_after_one_epoch(config: TrainConfig, out: Path) -> None:
    """Begins a run that ends by an exception as it reports its first epoch."""

    def report(line: str) -> None:
        if line.startswith("epoch 1/"):
            raise Stopped

    with pytest.raises(Stopped):
        train(config, out, progress=False, report=report)
