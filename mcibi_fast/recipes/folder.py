"""Your own dataset: in a folder, or in the format of another toolbox."""

from __future__ import annotations

from mcibi_fast.recipes import backbones
from mcibi_fast.recipes.backbones import Memory
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.recipes.sources import CocoData, Data, FolderData, HuggingFaceData


def folder(
    framework: str = "fcn", backbone: str = "resnet50", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """Your own dataset in a folder; the root is given with ``--root``.

    It has the paper's optimiser and augmentation (SGD 0.01, weight decay 5e-4, poly 0.9, crop
    512x512, batch 16) and by default a ResNet-50 at output stride 8.
    """
    return _config(FolderData(), framework, backbone, memory)


def coco(
    framework: str = "fcn", backbone: str = "resnet50", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """Objects in COCO's JSON; otherwise as `folder`. By default the splits of COCO 2017."""
    return _config(CocoData(), framework, backbone, memory)


def huggingface(
    framework: str = "fcn", backbone: str = "resnet50", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """A folder that ``save_to_disk`` of `datasets` wrote; otherwise as `folder`."""
    return _config(HuggingFaceData(), framework, backbone, memory)


def _config(data: Data, framework: str, backbone: str, memory: Memory) -> TrainConfig:
    return TrainConfig(
        data=data,
        model=backbones.model(framework, backbone, memory),
        optimizer=backbones.optimizer(backbone, lr=0.01, weight_decay=5e-4),
        epochs=100,
    )
