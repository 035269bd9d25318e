"""Our training beside the released package's, from the same start, on the same images.

    python -m benchmarks.released_training SSSEGMENTATION OUT --root DATA/camvid

SSSEGMENTATION is a checkout of https://github.com/SegmentationBLWX/sssegmentation (revision
eb1878c). Its FCN + MCIBI++ is built from its own configuration and takes its own steps (model,
losses, memory, optimiser, schedule), on our backbone with the same ImageNet weights. Ours is the
recipe ``camvid_lite``, whose head starts from the released one's weights. Both see the batches of
our loader, without dropout, which draws from different generators in the two.

In float32 small differences grow from step to step, in any training. So the released model is
trained a second time, in channels_last, where PyTorch sums the same products in another order: how
far it gets from itself is what rounding alone does.

Writes losses.csv (a line for each step) and prints the differences.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcibi_fast.compat import sssegmentation
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.recipes.registry import configure
from mcibi_fast.training.loss_log import LossReadings
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.trainer import Trainer

SETTINGS = (
    "mixed_precision=no",
    "optimizer.floor=0.01",
    "model.options.dropout=0",
)
COLUMNS = ("ours", "released", "released, channels_last")
Batch = dict[str, Any]
Losses = dict[str, float]


def released_model(trainer: Trainer) -> Any:
    """The package's FCN + MCIBI++ on our backbone."""
    backbone: Any = trainer.model.backbone
    spec = trainer.spec
    package = importlib.import_module("ssseg.modules.models.segmentors.mcibiplusplus")
    bases = importlib.import_module("ssseg.configs._base_.segmentors.mcibiplusplus")
    settings = deepcopy(dict(bases.MCIBIPLUSPLUS_SEGMENTOR_CFG))
    del settings["backbone"], settings["losses"]["loss_cwi"]
    settings |= {"num_classes": len(spec.classes), "norm_cfg": {"type": "BatchNorm2d"}}
    settings["head"]["in_channels"] = backbone.channels[-1]
    settings["auxiliary"] |= {"in_channels": backbone.channels[-2], "dropout": 0.0}
    for decoder in settings["head"]["decoder"].values():
        decoder["dropout"] = 0.0
    for loss in (*settings["losses"].values(), settings["head"]["update_cfg"]):
        loss["ignore_index"] = spec.ignore_index
    model = package.MCIBIPlusPlus(settings, "TRAIN")
    model.cfg["backbone"] = {"selected_indices": range(len(backbone.channels))}
    model.backbone_net = deepcopy(backbone)
    return model


class Released:
    """The package's loop: its optimiser and its schedule around its model."""

    def __init__(self, model: Any, config: TrainConfig, steps_per_epoch: int, layout: Any) -> None:
        optimizers = importlib.import_module("ssseg.modules.models.optimizers")
        schedulers = importlib.import_module("ssseg.modules.models.schedulers")
        self.model = model.to(memory_format=layout).train()
        self.layout = layout
        given = config.optimizer
        settings = deepcopy(model.cfg["scheduler"])
        settings["optimizer"] |= {
            "lr": given.lr,
            "momentum": given.momentum,
            "weight_decay": given.weight_decay,
        }
        self.optimizer = optimizers.BuildOptimizer(self.model, settings["optimizer"])
        settings |= {
            "lr": given.lr,
            "max_epochs": config.epochs,
            "iters_per_epoch": steps_per_epoch,
            "params_rules": {},
        }
        self.scheduler = schedulers.BuildScheduler(self.optimizer, settings)

    def step(self, batch: Batch, epoch: int) -> Losses:
        structures = importlib.import_module("ssseg.modules.utils")
        data = structures.SSSegInputStructure(
            mode="TRAIN",
            images=in_dtype(self.model, batch)["image"].contiguous(memory_format=self.layout),
            seg_targets=batch["label"].long(),
        )
        rate = self.scheduler.updatelr()
        self.optimizer.zero_grad()
        output = self.model(data, learning_rate=rate, epoch=epoch)
        output.loss.backward()
        self.scheduler.step()
        return output.losses_log_dict


class AllLosses(LossReadings):
    """Keeps those of every step, in full precision; the log of a run has float32."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Losses] = []

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        super().add(step, losses)
        self.steps.append({name: float(loss) for name, loss in losses.items()})


class Ours(Trainer):
    """Our trainer, which ends after some of its epochs and evaluates nothing."""

    def begin(self, head: nn.Module, dtype: torch.dtype) -> None:
        """Starts from the weights of this head."""
        self.start()
        self.model.head.load_state_dict(head.state_dict())
        if dtype == torch.float64:
            self.model.double()

    def train_epochs(self, epochs: int) -> list[Losses]:
        """The losses of each step."""
        self.readings = readings = AllLosses()
        with self.shown:
            for _ in range(epochs):
                self._train_epoch(lambda: False)
        return readings.steps

    def _train_step(self, batch: Batch) -> None:
        super()._train_step(in_dtype(self.model, batch))


def in_dtype(model: nn.Module, batch: Batch) -> Batch:
    return batch | {"image": batch["image"].to(next(model.parameters()).dtype)}


def compare(
    root: str, out: Path, epochs: int, dtype: torch.dtype, settings: Sequence[str]
) -> list[list[Losses]]:
    """The losses of each step: of ours, of the released package, and of it in channels_last."""
    config = configure("camvid_lite", root, [*SETTINGS, *settings])
    torch.set_num_threads(1)
    seed_global_generators(config.seed)
    trainer = Ours(config, Run(out / "ours"), progress=True)
    first = released_model(trainer).to(dtype)
    head = sssegmentation.head(
        first.state_dict(),
        dropout=0.0,
        negative_slope=0.0,
        ignore_index=trainer.spec.ignore_index,
    )
    steps = trainer.steps_per_epoch
    theirs = [
        Released(model, config, steps, layout)
        for model, layout in (
            (first, torch.contiguous_format),
            (deepcopy(first), torch.channels_last),
        )
    ]
    trainer.begin(head, dtype)
    seconds = time.perf_counter()
    found = [trainer.train_epochs(epochs)]
    print(f"ours: {time.perf_counter() - seconds:.0f} s", flush=True)
    for name, loop in zip(COLUMNS[1:], theirs, strict=True):
        seconds = time.perf_counter()
        found.append(
            [
                loop.step(batch, epoch + 1)
                for epoch in range(epochs)
                for batch in trainer.batches(epoch)
            ]
        )
        print(f"{name}: {time.perf_counter() - seconds:.0f} s", flush=True)
    trainer.close()
    memories = [trainer.model.memory.memory, *(loop.model.memory_module.memory for loop in theirs)]
    _tell_memories([m.detach() for m in memories])
    return found


def _tell_memories(memories: list[Tensor]) -> None:
    ours, first, second = memories
    print(
        f"memory at the end, largest difference: ours {(ours - first).abs().max():.1e}, "
        f"the released one in channels_last {(second - first).abs().max():.1e}"
    )


def tell(found: list[list[Losses]], out: Path) -> None:
    """Writes losses.csv and prints the largest relative differences over the steps."""
    names = ("loss_cls", "loss_pr", "loss_aux")
    steps = list(zip(*found, strict=True))
    with (out / "losses.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["step", *(f"{name}: {who}" for name in names for who in COLUMNS)])
        for number, step in enumerate(steps, start=1):
            lines.writerow([number, *(losses[name] for name in names for losses in step)])
    print("steps      ours - released      released - itself in channels_last")
    last = 0
    for until in (1, 2, 5, 10, 20, 45, 90, 135, 180):
        if until > len(steps):
            break
        largest = [0.0, 0.0]
        for ours, first, second in steps[last:until]:
            for i, other in enumerate((ours, second)):
                for name in names:
                    difference = abs(other[name] - first[name]) / abs(first[name])
                    largest[i] = max(largest[i], difference)
        print(f"{last + 1:3} to {until:3}   {largest[0]:.1e}             {largest[1]:.1e}")
        last = until


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="checkout of sssegmentation")
    parser.add_argument("out", type=Path, help="folder for the run and losses.csv")
    parser.add_argument("--root", required=True, help="CamVid")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--double", action="store_true", help="train in float64")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    sys.path.insert(0, str(args.package.resolve()))
    dtype = torch.float64 if args.double else torch.float32
    tell(compare(args.root, args.out, args.epochs, dtype, args.set), args.out)


if __name__ == "__main__":
    main()
