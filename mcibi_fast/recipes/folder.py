"""Any dataset in the layout of `mcibi_fast.data.FolderDataset`."""

from __future__ import annotations

from mcibi_fast.recipes import backbones
from mcibi_fast.recipes.backbones import Memory
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.recipes.sources import FolderData


def folder(
    framework: str = "fcn", backbone: str = "resnet50", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """Your own dataset in a folder; the root is given with ``--root``.

    It has the paper's optimiser and augmentation (SGD 0.01, weight decay 5e-4, poly 0.9, crop
    512x512, batch 16) and by default a ResNet-50 at output stride 8.
    """
    return TrainConfig(
        data=FolderData(),
        model=backbones.model(framework, backbone, memory),
        optimizer=backbones.optimizer(backbone, lr=0.01, weight_decay=5e-4),
        epochs=100,
    )
