"""What `mcibi-fast demo` trains: it takes minutes on two CPU cores."""

from __future__ import annotations

from mcibi_fast.recipes.config import ModelConfig, TrainConfig
from mcibi_fast.recipes.parts import AugmentationConfig, OptimizerConfig
from mcibi_fast.recipes.sources import ScenesData


def demo(model: str = "fcn_mcibipp") -> TrainConfig:
    """Built-in scenes at 128x128 with a small ResNet, trained from scratch.

    All models get the same data, backbone, schedule, augmentation and seeds.

    Args:
        model: "fcn", "fcn_mcibipp", ...
    """
    options = {"feats_channels": 64}
    if model.endswith("_mcibipp"):
        options["transform_channels"] = 32
    return TrainConfig(
        data=ScenesData(train_count=480, val_count=100, size=(128, 128)),
        model=ModelConfig.named(model, "test_resnet", options),
        optimizer=OptimizerConfig(lr=0.05, weight_decay=1e-4, clip_norm=5.0),
        augmentation=AugmentationConfig(crop_size=(96, 96), scale=(0.75, 1.5)),
        epochs=10,
        batch_size=8,
        workers=1,
        eval_batch_size=10,
        evaluate_every=2,
    )
