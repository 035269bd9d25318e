"""What the context tells a trained model: ``python -m benchmarks.camvid_context RUN``.

Scores a run of ``mcibi-fast ablate`` or ``train`` whose model has a memory (CamVid, or other images
of one size), while C_bi (Eqs. 11-13) is replaced: by zero, by its mean over the pixels of the
image, by that of another image, and by the mean over all images at each position. The last is
the same for every image: what it gives is known without looking at them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.camvid import evaluated, from_one_view
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.nn.context import DatasetLevelContext
from mcibi_fast.training.run import Run

ATTEND = DatasetLevelContext.attend


@contextmanager
def replaced(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """C_bi, (B, Z, h, w) of the next images of the split, becomes what this returns."""
    with patch.object(DatasetLevelContext, "attend", lambda *args: change(ATTEND(*args))):
        yield


class Images:
    """Takes the place of C_bi, image after image, by those of another order or by their mean."""

    def __init__(self) -> None:
        self.contexts: list[Tensor] = []
        self.seen = 0

    def keep(self, context: Tensor) -> Tensor:
        """The context itself, which is remembered."""
        self.contexts += context.cpu().unbind()
        return context

    def other(self, context: Tensor) -> Tensor:
        """Those of the images half of the split away."""
        count = len(self.contexts)
        others = [self.contexts[(self.seen + i + count // 2) % count] for i in range(len(context))]
        self.seen += len(context)
        return torch.stack(others).to(context)

    def mean(self, context: Tensor) -> Tensor:
        """The mean over all images at each position."""
        return torch.stack(self.contexts).mean(0).to(context).expand_as(context)


def scores(folder: Path, split: str = "val") -> Iterator[tuple[str, float]]:
    """mIoU in percent under each change.

    Args:
        folder: of a run that is finished.
        split: whose images are scored; all must have one size.
    """
    config = Run(folder).settings()
    model = load_model(folder / "checkpoints" / "last")[0]
    if not model.head.has_memory:
        raise SystemExit(f"{folder}: a model without a memory has no context")

    def score() -> float:
        return 100 * evaluated(config, model, split, from_one_view(config)).mean_iou

    images = Images()
    with replaced(images.keep):
        yield "as trained", score()
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "zero": torch.zeros_like,
        "mean over the image": lambda C: C.mean((2, 3), keepdim=True).expand_as(C),
        "of another image": images.other,
        "mean over all images": images.mean,
    }
    for name, change in changes.items():
        with replaced(change):
            yield name, score()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="val")
    args = parser.parse_args()
    for name, value in scores(args.run, args.split):
        print(f"{name:20} {value:.2f}", flush=True)


if __name__ == "__main__":
    main()
