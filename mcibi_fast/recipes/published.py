"""The paper's settings for the published datasets (Section 4.1 and the sections of the results).

ResNet-50 at output stride 8 from scratch; ``--set model.options.pretrained=true`` takes timm's
ImageNet weights, as the paper does. Sizes that the paper leaves open are the released code's: what
the random scale multiplies in training, and the size of the test images.
"""

from __future__ import annotations

from mcibi_fast.recipes.config import (
    AugmentationConfig,
    ModelConfig,
    NamedData,
    OptimizerConfig,
    TrainConfig,
)


def ade20k() -> TrainConfig:
    """ADE20K, 150 classes: 20,210 / 2,000 images."""
    return _config(
        NamedData("ade20k", short_side=512, long_side=2048),
        AugmentationConfig((512, 512), short_side=512, long_side=2048),
        epochs=130,
    )


def lip() -> TrainConfig:
    """LIP, 20 classes: 30,462 / 10,000 images; proportions are not kept."""
    return _human_parsing("lip")


def cihp() -> TrainConfig:
    """CIHP as LIP: 28,280 / 5,000 images. The paper trains none; it tests LIP's models there."""
    return _human_parsing("cihp")


def cityscapes() -> TrainConfig:
    """Cityscapes, 19 classes: 2,975 / 500 images.

    For the test server: ``--set data.train_split=trainval batch_size=16 epochs=440``.
    """
    return _config(
        NamedData("cityscapes", short_side=1024, long_side=2048),
        AugmentationConfig((512, 1024), short_side=1024, long_side=2048),
        epochs=220,
        batch_size=8,
    )


def coco_stuff() -> TrainConfig:
    """COCO-Stuff 10k, 182 outputs: 9,000 / 1,000 images.

    ``--set data.name=coco_stuff_171`` leaves out the 11 ids that never occur.
    """
    return _config(
        NamedData("coco_stuff", val_split="test", short_side=512, long_side=2048),
        AugmentationConfig((512, 512), short_side=512, long_side=2048),
        lr=0.001,
        weight_decay=1e-4,
        epochs=110,
    )


def pascal_context() -> TrainConfig:
    """PASCAL-Context, 59 classes: 4,998 / 5,105 images.

    ``--set data.name=pascal_context_60`` has the background as a class.
    """
    return _config(
        NamedData("pascal_context", short_side=520, long_side=520),
        AugmentationConfig((480, 480), short_side=520, long_side=520),
        lr=0.004,
        weight_decay=1e-4,
        epochs=260,
    )


def voc() -> TrainConfig:
    """VOC 2012 with SBD's masks, 21 classes: 10,582 / 1,449 images."""
    return _config(
        NamedData("voc", train_split="trainaug", short_side=512, long_side=2048),
        AugmentationConfig((512, 512), short_side=512, long_side=2048),
        epochs=60,
    )


def _human_parsing(name: str) -> TrainConfig:
    augmentation = AugmentationConfig(
        (473, 473), size=(520, 520), scale=(0.75, 1.25), rotation=30.0, rotation_probability=0.6
    )
    return _config(NamedData(name, size=(473, 473)), augmentation, epochs=150, batch_size=32)


def _config(
    data: NamedData,
    augmentation: AugmentationConfig,
    *,
    epochs: int,
    batch_size: int = 16,
    lr: float = 0.01,
    weight_decay: float = 5e-4,
) -> TrainConfig:
    return TrainConfig(
        data=data,
        model=ModelConfig(name="fcn_mcibipp", backbone="resnet50"),
        optimizer=OptimizerConfig(lr=lr, weight_decay=weight_decay),
        augmentation=augmentation,
        epochs=epochs,
        batch_size=batch_size,
        workers=8,
        evaluate_every=10,
    )
