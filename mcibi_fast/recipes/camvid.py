"""CamVid, 11 classes, 480x360: 367 / 101 / 233 images."""

from __future__ import annotations

from mcibi_fast.recipes import backbones
from mcibi_fast.recipes.backbones import Memory
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.recipes.parts import AugmentationConfig
from mcibi_fast.recipes.sources import FolderData


def camvid(
    framework: str = "fcn", backbone: str = "resnet50", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """CamVid in the folder layout; the root is given with ``--root``.

    By default a ResNet-50 at output stride 8, trained from scratch (``--set
    model.options.pretrained=true`` loads timm's ImageNet weights) with the paper's optimiser.
    """
    from mcibi_fast.data import CAMVID_CLASSES

    return TrainConfig(
        data=FolderData(classes=list(CAMVID_CLASSES)),
        model=backbones.model(framework, backbone, memory),
        optimizer=backbones.optimizer(backbone, lr=0.01, weight_decay=5e-4),
        augmentation=AugmentationConfig(crop_size=(352, 352)),
        epochs=200,
        batch_size=16,
        evaluate_every=10,
        eval_batch_size=8,
    )
