"""A dataset of CamVid's classes in small, and settings for ``camvid_lite`` to train on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.commands.folders import write_folder

SETTINGS = (
    "model.backbone=test_resnet",
    "model.options.pretrained=false",
    "augmentation.crop_size=[32,32]",
    "batch_size=2",
    "workers=0",
    "device=cpu",
    "mixed_precision=no",
)


def write_small_camvid(root: Path) -> str:
    """Two images of 32x32 with all 11 classes in each split; returns the folder."""
    mask = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32) % 11
    return str(write_folder(root, mask, np.repeat(mask[..., None] * 20, 3, axis=2)))
