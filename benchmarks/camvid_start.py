"""What slows FCN + MCIBI++ down in the first epochs: ``python -m benchmarks.camvid_start OUT``.

Trains the recipe ``camvid_lite`` with single parts of the head taken out, stops each training after
a few of its epochs, and prints the mean training loss of every epoch. All variants see the same
images in the same order, so that small differences mean something long before mIoU shows them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from mcibi_fast.nn.context import DatasetLevelContext as Context
from mcibi_fast.recipes.registry import configure
from mcibi_fast.training import train as training
from mcibi_fast.training.history import read_history
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.threads import leave_cores_to_loaders
from mcibi_fast.training.trainer import Trainer

Change = Callable[[], AbstractContextManager[Any]]
ATTEND, PROJECT = Context.attend, Context.project


def _attend(change: Callable[..., Tensor]) -> Change:
    return lambda: patch.object(Context, "attend", change)


VARIANTS: dict[str, tuple[tuple[str, ...], Change]] = {
    "FCN": (("model.memory=none",), nullcontext),
    "FCN of two convolutions": (("model.memory=none", "model.options.convs=2"), nullcontext),
    "MCIBI++": ((), nullcontext),
    "C_bi = 0": ((), _attend(lambda self, *args: 0 * ATTEND(self, *args))),
    "C_bi = C~_bi": ((), _attend(lambda self, query, logits, size: self._coarse(logits))),
    "C_bi detached": ((), _attend(lambda self, *args: ATTEND(self, *args).detach())),
    "W detached": (("model.options.detach_weights=true",), nullcontext),
    "R detached for the query": (
        (),
        lambda: patch.object(Context, "project", lambda self, R: PROJECT(self, R.detach())),
    ),
    "linear projections": (("model.options.projections=paper",), nullcontext),
    "paper form": (("model.options.form=paper",), nullcontext),
    "fusion by adding": (("model.options.fusion=add",), nullcontext),
    "no loss of W": (("model.options.alpha=0",), nullcontext),
    "no dropout": (("model.options.dropout=0",), nullcontext),
}


def begin(name: str, out: Path, root: str, epochs: int, settings: list[str]) -> None:
    """Trains the first epochs of a variant, continuing from its last checkpoint if there is one."""

    class Beginning(Trainer):
        """Ends early; the learning rate falls as in the whole training."""

        def _is_over(self) -> bool:
            return self.step >= epochs * self.steps_per_epoch

    own, change = VARIANTS[name]
    config = configure("camvid_lite", root, [*settings, *own, f"evaluate_every={epochs}"])
    leave_cores_to_loaders(config.workers)
    seed_global_generators(config.seed)
    with change(), patch.object(training, "Trainer", Beginning):
        training.train(config, out, resume=Run(out).checkpoint("last") is not None)


def losses(out: Path, name: str, epochs: int) -> list[float]:
    """The mean of a loss, before it is weighted, over each epoch."""
    entries = read_history(out / "history.jsonl")
    per_epoch = max(entry["step"] for entry in entries) // epochs
    weight = 1.0 if name == "loss_cls" else 0.4
    found: dict[int, list[float]] = {}
    for entry in entries:
        if name in entry.get("losses", {}):
            epoch = (entry["step"] - 1) // per_epoch
            found.setdefault(epoch, []).append(entry["losses"][name] / weight)
    return [statistics.mean(values) for values in found.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--root", required=True, help="CamVid")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    for name in args.only:
        out = args.out / name.replace(" ", "_").replace("~", "")
        begin(name, out, args.root, args.epochs, args.set)
        for loss in ("loss_cls", "loss_pr", "loss_aux"):
            if means := losses(out, loss, args.epochs):
                print(f"{name}: {loss}", *(f"{value:.3f}" for value in means), flush=True)


if __name__ == "__main__":
    main()
