"""Trains a model of this package with transformers' Trainer, and uses it as any of transformers.

    python examples/hf_trainer.py --steps 200 --out out/hf

The images are the built-in scenes. Afterwards the folder ``out/hf/model`` holds the model, which
``AutoModelForSemanticSegmentation``, ``pipeline`` and ``mcibi_fast.load`` open.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments, pipeline

import mcibi_fast.compat.transformers.auto  # noqa: F401  (transformers knows our models)
from mcibi_fast import models, upsample_confusion
from mcibi_fast.data import SCENES_CLASSES, SCENES_PALETTE, Scenes
from mcibi_fast.metrics import ConfusionMatrix


class TrainerData(Dataset):
    """The built-in scenes under the names that transformers uses."""

    def __init__(self, split: str, count: int, size: int) -> None:
        self.scenes = Scenes(split, count=count, size=size, seed=0)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.scenes[index]
        return {"pixel_values": sample["image"], "labels": sample["label"].long()}


def mean_iou(prediction: EvalPrediction) -> dict[str, float]:
    """The mean IoU at the labels' size; the logits are at the network's stride."""
    logits, labels = (torch.from_numpy(each) for each in prediction)
    confusion = ConfusionMatrix(len(SCENES_CLASSES))
    confusion.add(upsample_confusion(logits, labels, len(SCENES_CLASSES)))
    return confusion.compute().summary()


def main() -> None:
    """Trains, evaluates, saves, and labels one picture."""
    parser = argparse.ArgumentParser(description="Train with transformers' Trainer.")
    parser.add_argument("--model", default="fcn_mcibipp")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--channels", type=int, default=128, help="of the head (default: 128)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1, help="passes per step (default: 1)")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/hf"))
    args = parser.parse_args()

    torch.manual_seed(0)
    model = models.create(
        args.model, len(SCENES_CLASSES), args.backbone, feats_channels=args.channels
    )
    model.normalisation = Scenes.mean, Scenes.std
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            bf16=args.bf16,
            use_cpu=args.cpu,
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=TrainerData("train", args.images, args.size),
        eval_dataset=TrainerData("val", max(args.batch, args.images // 10), args.size),
        compute_metrics=mean_iou,
    )
    trainer.train()
    scores: dict[str, Any] = trainer.evaluate()
    print(f"loss {scores['eval_loss']:.4f}, mean IoU {scores['eval_mean_iou']:.4f}")

    folder = model.cpu().save_pretrained(
        args.out / "model", classes=SCENES_CLASSES, palette=SCENES_PALETTE.tolist()
    )
    pixels, _ = Scenes("test", count=1, size=args.size, seed=0).read(0)
    segment = pipeline("image-segmentation", model=str(folder), device="cpu")
    for part in segment(Image.fromarray(pixels)):
        share = np.asarray(part["mask"]).mean() / 255
        print(f"{part['label']}: {share:.1%} of the picture")


if __name__ == "__main__":
    main()
