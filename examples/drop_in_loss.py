"""A faster loss for SegFormer of transformers: one line changes, the numbers do not.

    python examples/drop_in_loss.py
    python examples/drop_in_loss.py --size 512 --classes 150

Trains a SegFormer with random weights for a few steps on random labels, once with the loss of
transformers and once with `upsample_cross_entropy`, and prints both losses, times and gradients.
Needs: pip install transformers
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import mcibi_fast


def of_transformers(model: SegformerForSemanticSegmentation, images: Tensor, labels: Tensor):
    """The library's loss: logits upsampled to the labels' size, then the cross entropy."""
    return model(pixel_values=images, labels=labels).loss


def fused(model: SegformerForSemanticSegmentation, images: Tensor, labels: Tensor):
    """The same loss from the small logits."""
    return mcibi_fast.upsample_cross_entropy(model(pixel_values=images).logits, labels)


Loss = Callable[[SegformerForSemanticSegmentation, Tensor, Tensor], Tensor]


def train(loss_of: Loss, args: argparse.Namespace) -> tuple[list[float], float, Tensor]:
    """Losses of the steps, seconds per step, and the gradient of the classifier at the end."""
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=args.classes)).eval()
    images = torch.randn(args.batch, 3, args.size, args.size)
    labels = torch.randint(0, args.classes, (args.batch, args.size, args.size))
    labels[:, : args.size // 8] = 255  # pixels that do not count
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses, start = [], time.perf_counter()
    for _ in range(args.steps):
        optimizer.zero_grad()
        loss = loss_of(model, images, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = (time.perf_counter() - start) / args.steps
    gradient = model.decode_head.classifier.weight.grad
    assert gradient is not None
    return losses, seconds, gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=128, help="side of the images (default: 128)")
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    theirs, their_time, their_gradient = train(of_transformers, args)
    ours, our_time, our_gradient = train(fused, args)
    print("loss of transformers:   ", *(f"{loss:.6f}" for loss in theirs))
    print("upsample_cross_entropy: ", *(f"{loss:.6f}" for loss in ours))
    print(f"seconds per step: {their_time:.3f} and {our_time:.3f}")
    difference = (our_gradient - their_gradient).norm() / their_gradient.norm()
    print(f"relative difference of the classifier's gradient: {difference:.1e}")


if __name__ == "__main__":
    main()
