"""Trains a small model of another library with MCIBI++'s memory on the built-in scenes.

    python examples/own_decoder.py --library transformers --steps 400

The model is a SegFormer of transformers, an FPN of segmentation_models.pytorch ("smp"), or an FCN
of torchvision, onedl-mmsegmentation ("mmseg") or sssegmentation, built from a configuration with
random weights, or a module in plain PyTorch ("none"). It prints the loss, how far the memory has
moved, and the mIoU on scenes that the model was not trained on: before the training, and after it
with one stage and with three.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.compat.dataset_context import context_of
from mcibi_fast.data.synthetic.scenes import Scenes
from mcibi_fast.metrics import ConfusionMatrix
from mcibi_fast.nn import DatasetLevelContext, GaussianMemory
from mcibi_fast.nn.class_memory import ClassMemory

CLASSES = 12
OPTIONS = {"transform_channels": 32}


class Example(NamedTuple):
    """A model, its loss of images and labels, and its logits of images."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(upsampled(logits, labels), labels, ignore_index=255)


def upsampled(logits: Tensor, labels: Tensor) -> Tensor:
    return F.interpolate(logits, labels.shape[1:], mode="bilinear")


class Plain(nn.Module):
    """A decoder of one's own: labels are all that the context needs to update its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()),
        )
        self.context = DatasetLevelContext(GaussianMemory(CLASSES, 64), **OPTIONS)
        self.classifier = nn.Conv2d(64, CLASSES, 1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        augmented, weight_logits = self.context(self.features(images), labels=labels)
        return self.classifier(augmented), weight_logits


def none() -> Example:
    model = Plain()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        logits, weight_logits = model(images, labels)
        return cross_entropy(logits, labels) + 0.4 * cross_entropy(weight_logits, labels)

    return Example(model, loss, lambda images: model(images)[0])


def transformers() -> Example:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    from mcibi_fast.compat.transformers import with_mcibi

    config = SegformerConfig(
        num_labels=CLASSES,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=64,
    )
    model = with_mcibi(SegformerForSemanticSegmentation(config), **OPTIONS)
    return Example(
        model,
        lambda images, labels: model(pixel_values=images, labels=labels).loss,
        lambda images: model(pixel_values=images).logits,
    )


def smp() -> Example:
    from segmentation_models_pytorch import FPN

    from mcibi_fast.compat.smp import with_mcibi

    model = with_mcibi(FPN("resnet18", encoder_weights=None, classes=CLASSES), **OPTIONS)
    return Example(
        model,
        lambda images, labels: cross_entropy(model(images), labels) + model.mcibi_loss(labels),
        model,
    )


def torchvision() -> Example:
    from torchvision.models import resnet18
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    from mcibi_fast.compat.torchvision import with_mcibi

    # A ResNet-18 up to its third stage, at stride 16. fcn_resnet50(num_classes=12) is the same
    # with a larger backbone.
    backbone = IntermediateLayerGetter(resnet18(), {"layer3": "out"})
    model = with_mcibi(FCN(backbone, FCNHead(256, CLASSES)), **OPTIONS)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model(images)["out"], labels) + model.mcibi_loss(labels)

    return Example(model, loss, lambda images: model(images)["out"])


def mmseg() -> Example:
    import mmseg.models  # noqa: F401 - registers them
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    from mcibi_fast.compat.mmseg import with_mcibi

    norm = {"type": "BN"}
    built = MODELS.build(
        {
            "type": "EncoderDecoder",
            "data_preprocessor": {"type": "mmseg.SegDataPreProcessor"},
            "backbone": {"type": "ResNetV1c", "depth": 18, "norm_cfg": norm},
            "decode_head": {
                "type": "FCNHead",
                "in_channels": 512,
                "channels": 64,
                "num_convs": 1,
                "num_classes": CLASSES,
                "norm_cfg": norm,
            },
            "test_cfg": {"mode": "whole"},
        }
    )
    model = with_mcibi(built, **OPTIONS)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
        return model.parse_losses(model(images, samples, mode="loss"))[0]

    return Example(model, loss, lambda images: model(images, mode="tensor"))


def sssegmentation() -> Example:
    from ssseg.modules.models.segmentors.builder import BuildSegmentor
    from ssseg.modules.utils import SSSegInputStructure

    from mcibi_fast.compat.sssegmentation import with_mcibi

    built = BuildSegmentor(
        {
            "type": "FCN",
            "num_classes": CLASSES,
            "align_corners": False,
            "norm_cfg": {"type": "BatchNorm2d"},
            "act_cfg": {"type": "ReLU", "inplace": True},
            "backbone": {
                "type": "ResNet",
                "structure_type": "resnet18",
                "depth": 18,
                "outstride": 16,
                "pretrained": False,
            },
            "head": {"in_channels": 512, "feats_channels": 64, "num_convs": 1, "dropout": 0.1},
            "auxiliary": None,
            "losses": {"loss_cls": {"type": "CrossEntropyLoss", "ignore_index": 255}},
        },
        mode="TRAIN",
    )
    model = with_mcibi(built, **OPTIONS)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return model(SSSegInputStructure("TRAIN", images=images, seg_targets=labels)).loss

    def logits(images: Tensor) -> Tensor:
        return model(SSSegInputStructure("TEST", images=images)).seg_logits

    return Example(model, loss, logits)


def batch(split: str, start: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    data = Scenes(split, count=start + count, size=size, seed=0)
    samples = [data[i] for i in range(start, start + count)]
    images, labels = ([sample[key] for sample in samples] for key in ("image", "label"))
    return torch.stack(images), torch.stack(labels).long()


@torch.no_grad()
def mean_iou(example: Example, size: int) -> float:
    """The mIoU in percent on 32 scenes of the split "val"."""
    example.model.eval()
    confusion = ConfusionMatrix(CLASSES)
    for start in range(0, 32, 8):
        images, labels = batch("val", start, 8, size)
        logits = upsampled(example.logits(images), labels)
        confusion.update(logits.argmax(1), labels)
    example.model.train()
    return 100 * confusion.compute().mean_iou


def main(arguments: Sequence[str] | None = None) -> None:
    models = (transformers, smp, torchvision, mmseg, sssegmentation, none)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=[make.__name__ for make in models], default="none")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of each step")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    example = next(make for make in models if make.__name__ == args.library)()
    memory = memory_of(example.model)
    print(f"mIoU {mean_iou(example, args.size):.2f} before the training", flush=True)
    initial = memory.memory.clone()
    optimizer = torch.optim.AdamW(example.model.parameters(), lr=1e-3)
    for step in range(1, args.steps + 1):
        total = 0.0
        for part in range(args.accumulate):
            start = ((step - 1) * args.accumulate + part) * args.batch_size
            loss = example.loss(*batch("train", start, args.batch_size, args.size))
            (loss / args.accumulate).backward()
            total += float(loss.detach()) / args.accumulate
        optimizer.step()  # updates the memory as well
        optimizer.zero_grad()
        if step == 1 or step % 20 == 0:
            mean, deviation = (memory.memory - initial).abs().mean(0)
            print(
                f"step {step}  loss {total:.3f}  the memory's means have moved by "
                f"{float(mean):.4f}, its deviations by {float(deviation):.4f}",
                flush=True,
            )
    print(f"mIoU {mean_iou(example, args.size):.2f} after it")
    if args.library != "none":
        context_of(example.model).stages = 3
        print(f"mIoU {mean_iou(example, args.size):.2f} with three stages")


def memory_of(model: nn.Module) -> ClassMemory:
    held = model if isinstance(model, Plain) else context_of(model)
    return held.context.memory


if __name__ == "__main__":
    main()
