"""Recipes for videos: VSPW (the paper's settings, Section 5.1), CamVid, the built-in moving scenes.

They train image models on single frames (``data.history=0``); for a video model set
``model.history`` and ``data.history`` to the same number.
"""

from __future__ import annotations

from dataclasses import replace

from mcibi_fast.recipes import backbones
from mcibi_fast.recipes.backbones import Memory
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.recipes.demo import demo
from mcibi_fast.recipes.parts import AugmentationConfig, InferenceConfig
from mcibi_fast.recipes.sources import MovingScenesData, VideoData


def vspw(
    framework: str = "upernet", backbone: str = "resnet101", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """VSPW 480p, 124 classes: 2,806 / 343 videos, one random frame of each per epoch.

    240 epochs of 175 steps are the paper's 42,000 iterations; the backbone's learning rate and the
    sliding windows are those of the released code.
    """
    return TrainConfig(
        data=VideoData("vspw", short_side=512, history=0),
        model=backbones.model(framework, backbone, memory),
        optimizer=backbones.optimizer(backbone, lr=0.01, weight_decay=5e-4, backbone_lr=0.1),
        augmentation=AugmentationConfig((512, 512), short_side=512),
        inference=InferenceConfig(window=(512, 512), stride=(341, 341), softmax="stride"),
        epochs=240,
        batch_size=16,
        workers=8,
        evaluate_every=20,
    )


def camvid_video(
    framework: str = "upernet", backbone: str = "resnet50", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """CamVid's labelled frames as videos: 1 second apart in train and test, 1/15 second in val."""
    return TrainConfig(
        data=VideoData("camvid", history=0, train_frames="all"),
        model=backbones.model(framework, backbone, memory),
        optimizer=backbones.optimizer(backbone, lr=0.01, weight_decay=5e-4),
        augmentation=AugmentationConfig((352, 352)),
        epochs=200,
        batch_size=16,
        evaluate_every=10,
    )


def moving_scenes(model: str = "fcn_mcibipp") -> TrainConfig:
    """The built-in moving scenes with the demo's model and schedule, for a CPU.

    Args:
        model: "fcn", "fcn_mcibipp", ...
    """
    return replace(
        demo(model),
        data=MovingScenesData(train_count=480, val_count=10, size=(128, 128), history=0),
    )
