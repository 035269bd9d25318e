"""What knowing the classes of an image would bring: ``python -m benchmarks.present_classes RUN``.

By Eqs. 11 to 13 a pixel's context C_bi is a mean of class representations. Its weights depend on
the pixel's own features and on how many pixels gather each class: of the rest of the image it says
which classes there are and how large they are, but not where. This scores a trained run as it is,
and with its predictions confined to the classes that the labels of the image have.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from mcibi_fast.data.base import renormalised
from mcibi_fast.data.transforms import under_protocol
from mcibi_fast.metrics import ConfusionMatrix
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.nn.one_logit import two_logits
from mcibi_fast.training.run import Run


class Presence(NamedTuple):
    """mIoU in percent as trained and with the classes known, and the mean number of these."""

    trained: float
    known: float
    present: float
    classes: int


@torch.no_grad()
def scores(folder: Path, split: str = "val") -> Presence:
    """The scores of a run's last checkpoint on whole images, at one scale.

    Args:
        folder: of a run that is finished.
        split: whose images are scored.
    """
    model, spec = load_model(folder / "checkpoints" / "last")
    config = Run(folder).settings()
    dataset = renormalised(config.data.dataset(split), model.normalisation)
    dataset = under_protocol(dataset, config.inference.protocol)
    K = len(spec.classes)
    trained, known = (ConfusionMatrix(K, spec.ignore_index) for _ in range(2))
    present = 0
    for index in range(len(dataset)):
        sample = dataset[index]
        labels = sample["label"][None].long()
        logits = two_logits(model(sample["image"][None]).logits)
        logits = model.head.upsample(logits, labels.shape[1:])
        occurring = [k for k in labels.unique().tolist() if 0 <= k < K and k != spec.ignore_index]
        absent = torch.ones(K, dtype=torch.bool)
        absent[occurring] = False
        trained.update(logits.argmax(1), labels)
        known.update(logits.masked_fill(absent[:, None, None], -torch.inf).argmax(1), labels)
        present += len(occurring)
    percent = [100 * matrix.compute().mean_iou for matrix in (trained, known)]
    return Presence(*percent, present / len(dataset), K)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--split", default="val")
    args = parser.parse_args()
    for folder in args.runs:
        found = scores(folder, args.split)
        print(
            f"{folder.name}: as trained {found.trained:.2f}, classes known {found.known:.2f}; "
            f"{found.present:.1f} of {found.classes} classes in an image",
            flush=True,
        )


if __name__ == "__main__":
    main()
