"""The paper's settings for the published datasets (Section 4.1 and the sections of the results).

Each recipe takes a framework, a backbone (any of timm's) and a memory or None. Backbones are
trained from scratch; ``--set model.options.pretrained=true`` loads timm's ImageNet weights, as the
paper does. If the paper's settings differ between backbones, a recipe uses those of the backbone's
family, see `recipes.backbones`. What the paper leaves open is taken from the released code: the
size that the random scale multiplies in training, the size of the test images, and the settings of
ResNeSt, HRNet and Swin.
"""

from __future__ import annotations

from mcibi_fast.recipes import backbones
from mcibi_fast.recipes.backbones import Memory, family
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.recipes.parts import AugmentationConfig, OptimizerConfig
from mcibi_fast.recipes.sources import NamedData


def ade20k(
    framework: str = "fcn", backbone: str = "resnet50", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """ADE20K, 150 classes: 20,210 / 2,000 images. With Swin, crops and test images are of 640."""
    side = 640 if family(backbone) == "swin" else 512
    long_side = 4 * side
    resnest = family(backbone) == "resnest"
    return _config(
        NamedData("ade20k", short_side=side, long_side=long_side),
        AugmentationConfig((side, side), short_side=side, long_side=long_side),
        backbones.optimizer(backbone, lr=0.004 if resnest else 0.01, weight_decay=5e-4),
        (framework, backbone, memory),
        epochs=180 if resnest else 130,
    )


def lip(
    framework: str = "fcn", backbone: str = "resnet50", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """LIP, 20 classes: 30,462 / 10,000 images, resized without keeping their proportions."""
    return _human_parsing("lip", framework, backbone, memory)


def cihp(
    framework: str = "fcn", backbone: str = "resnet50", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """CIHP with LIP's settings: 28,280 / 5,000 images.

    The paper trains no model on CIHP; it only tests models on it that were trained on LIP.
    """
    return _human_parsing("cihp", framework, backbone, memory)


def cityscapes(
    framework: str = "fcn", backbone: str = "resnet50", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """Cityscapes, 19 classes: 2,975 / 500 images."""
    lr = 0.004 if family(backbone) == "resnest" else 0.01
    return _config(
        NamedData("cityscapes", short_side=1024, long_side=2048),
        AugmentationConfig((512, 1024), short_side=1024, long_side=2048),
        backbones.optimizer(backbone, lr=lr, weight_decay=5e-4),
        (framework, backbone, memory),
        epochs=220,
        batch_size=8,
    )


def cityscapes_trainval(
    framework: str = "deeplabv3", backbone: str = "resnet101", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """Cityscapes for the test server (Table 13): trained on train and val, 3,475 images.

    It is scored on val, that is, on images it was trained on.
    """
    config = cityscapes(framework, backbone, memory=memory)
    config.data.train_split = "trainval"
    config.epochs, config.batch_size = 440, 16
    return config


def coco_stuff(
    framework: str = "fcn", backbone: str = "resnet50", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """COCO-Stuff 10k, 182 outputs: 9,000 / 1,000 images.

    ``--set data.name=coco_stuff_171`` leaves out the 11 ids that never occur.
    """
    return _config(
        NamedData("coco_stuff", val_split="test", short_side=512, long_side=2048),
        AugmentationConfig((512, 512), short_side=512, long_side=2048),
        backbones.optimizer(backbone, lr=0.001, weight_decay=1e-4),
        (framework, backbone, memory),
        epochs=150 if family(backbone) in ("resnest", "swin") else 110,
        batch_size=32 if family(backbone) == "resnest" else 16,
    )


def pascal_context(
    framework: str = "fcn", backbone: str = "resnet50", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """PASCAL-Context, 59 classes: 4,998 / 5,105 images.

    As in the released code, a ResNet-101 or ResNeSt-101 has a tenth of the head's learning rate.
    With ``--set data.name=pascal_context_60`` the background is a class as well.
    """
    backbone_lr = 0.1 if backbone.startswith(("resnet101", "resnest101")) else 1.0
    return _config(
        NamedData("pascal_context", short_side=520, long_side=520),
        AugmentationConfig((480, 480), short_side=520, long_side=520),
        backbones.optimizer(backbone, lr=0.004, weight_decay=1e-4, backbone_lr=backbone_lr),
        (framework, backbone, memory),
        epochs=260,
    )


def voc(
    framework: str = "fcn", backbone: str = "resnet50", *, memory: Memory = "mcibipp"
) -> TrainConfig:
    """VOC 2012 with SBD's masks, 21 classes: 10,582 / 1,449 images."""
    return _config(
        NamedData("voc", train_split="trainaug", short_side=512, long_side=2048),
        AugmentationConfig((512, 512), short_side=512, long_side=2048),
        backbones.optimizer(backbone, lr=0.01, weight_decay=5e-4),
        (framework, backbone, memory),
        epochs=60,
    )


def _human_parsing(name: str, framework: str, backbone: str, memory: Memory) -> TrainConfig:
    kind = family(backbone)
    return _config(
        NamedData(name, size=(473, 473)),
        AugmentationConfig(
            (473, 473), size=(520, 520), scale=(0.75, 1.25), rotation=30.0, rotation_probability=0.6
        ),
        backbones.optimizer(backbone, lr=0.007 if kind == "hrnet" else 0.01, weight_decay=5e-4),
        (framework, backbone, memory),
        epochs=110 if kind == "swin" else 150,
        batch_size={"hrnet": 40, "swin": 16}.get(kind, 32),
    )


def _config(
    data: NamedData,
    augmentation: AugmentationConfig,
    optimizer: OptimizerConfig,
    model: tuple[str, str, Memory],
    *,
    epochs: int,
    batch_size: int = 16,
) -> TrainConfig:
    framework, backbone, memory = model
    return TrainConfig(
        data=data,
        model=backbones.model(framework, backbone, memory),
        optimizer=optimizer,
        augmentation=augmentation,
        epochs=epochs,
        batch_size=batch_size,
        workers=8,
        evaluate_every=10,
    )
