"""Trains models of this package, torchvision and smp with Lightning, on several processes.

    python examples/lightning_module.py --model fcn_mcibipp --devices 2 --precision bf16-mixed
    python examples/lightning_module.py --model torchvision:fcn_resnet50
    python examples/lightning_module.py --model smp:DeepLabV3Plus

The images are the built-in scenes. On CPUs the processes talk by gloo.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mcibi_fast import models, upsample_confusion, upsample_cross_entropy
from mcibi_fast.data import SCENES_CLASSES, Scenes
from mcibi_fast.metrics import ConfusionMatrix
from mcibi_fast.nn.accumulation import more_passes

K = len(SCENES_CLASSES)


class SegmentationModule(lightning.LightningModule):
    """Any network from images (B, 3, H, W) to logits.

    Models of this package bring their losses and update their memory by themselves. Of others the
    loss is the cross entropy, with torchvision's auxiliary head at half of it.

    Args:
        model: a model of this package, of torchvision, of smp, or any that returns logits.
        num_classes: K.
        lr: learning rate of AdamW.
    """

    def __init__(self, model: nn.Module, num_classes: int, *, lr: float = 1e-3) -> None:
        super().__init__()
        self.model = model
        self.confusion = ConfusionMatrix(num_classes)
        self.num_classes, self.lr = num_classes, lr

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, h, w), at the network's stride or at the images' size."""
        found = self.model(images)
        if isinstance(self.model, models.Segmentor):
            return found.logits
        return found["out"] if isinstance(found, dict) else found

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The training loss, a scalar."""
        if isinstance(self.model, models.Segmentor):
            return self.model(images, labels).loss
        found = self.model(images)
        if not isinstance(found, dict):
            return upsample_cross_entropy(found, labels)
        auxiliary = [upsample_cross_entropy(found["aux"], labels)] if "aux" in found else []
        return upsample_cross_entropy(found["out"], labels) + 0.5 * sum(auxiliary)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One pass; with ``accumulate_grad_batches`` the memory learns with a step's last pass."""
        passes = self.trainer.accumulate_grad_batches
        more = (batch_idx + 1) % passes != 0 and batch_idx + 1 < self.trainer.num_training_batches
        with more_passes(more):
            loss = self.loss(batch["image"], batch["label"])
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Counts a batch; the upsampled logits are not formed."""
        logits, labels = self(batch["image"]), batch["label"]
        self.confusion.add(upsample_confusion(logits, labels, self.num_classes))

    def on_validation_epoch_end(self) -> None:
        """The mean IoU over all processes."""
        scores = self.confusion.reduce().compute()
        self.confusion = ConfusionMatrix(self.num_classes)
        self.log("mean_iou", scores.mean_iou, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on all parameters."""
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr)


def network(name: str, backbone: str) -> nn.Module:
    """A model by its name: one of ours, "torchvision:NAME" or "smp:NAME"."""
    library, _, kind = name.rpartition(":")
    if library == "torchvision":
        from torchvision.models import segmentation

        options = {"weights": None, "weights_backbone": None, "num_classes": K}
        return segmentation.__dict__[kind](**options)
    if library == "smp":
        import segmentation_models_pytorch as smp

        return getattr(smp, kind)(backbone, encoder_weights=None, classes=K)
    return models.create(kind, K, backbone, feats_channels=128)


def main() -> None:
    """Trains for some steps and prints the scores."""
    parser = argparse.ArgumentParser(description="Train with Lightning.")
    parser.add_argument("--model", default="fcn_mcibipp")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="per process (default: 8)")
    parser.add_argument("--accumulate", type=int, default=1, help="passes per step (default: 1)")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="auto", help="auto, cpu or gpu")
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed")
    args = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    module = SegmentationModule(network(args.model, args.backbone), K)
    train, val = (
        DataLoader(Scenes(split, count=count, size=args.size, seed=0), args.batch, shuffle=shuffled)
        for split, count, shuffled in (
            ("train", args.images, True),
            ("val", max(args.batch * args.devices, args.images // 10), False),
        )
    )
    trainer = lightning.Trainer(
        max_steps=args.steps,
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        precision=args.precision,
        accumulate_grad_batches=args.accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train)
    loss = float(trainer.callback_metrics["loss"])
    (scores,) = trainer.validate(module, val, verbose=False)
    if trainer.is_global_zero:
        print(f"steps {trainer.global_step}, loss {loss:.4f}, mean IoU {scores['mean_iou']:.4f}")


if __name__ == "__main__":
    main()
