"""The built-in scenes at a size that suits a GPU."""

from __future__ import annotations

from mcibi_fast.recipes.config import ModelConfig, TrainConfig
from mcibi_fast.recipes.parts import AugmentationConfig, OptimizerConfig
from mcibi_fast.recipes.sources import ScenesData


def scenes() -> TrainConfig:
    """Built-in scenes with a ResNet-18, trained from scratch."""
    return TrainConfig(
        data=ScenesData(train_count=4000, val_count=400, size=(192, 192)),
        model=ModelConfig(
            framework="fcn",
            memory="mcibipp",
            backbone="resnet18",
            options={"feats_channels": 256, "transform_channels": 128},
        ),
        optimizer=OptimizerConfig(lr=0.02),
        augmentation=AugmentationConfig(crop_size=(160, 160)),
        epochs=30,
        eval_batch_size=16,
    )
