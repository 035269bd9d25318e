"""The command on tiny scenes, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

from mcibi_fast.ablations.runs import TrainedRun
from mcibi_fast.recipes import TrainConfig

TINY = (
    "model.options.feats_channels=8",
    "model.options.transform_channels=8",
    "epochs=1",
    "batch_size=4",
    "augmentation.crop_size=[32,32]",
    "device=cpu",
    "workers=0",
    "log_every=1",
)
SCENES = (*TINY, "data.train_count=8", "data.val_count=3", "data.size=[40,48]")


def arguments(table: str, out: Path, *more: str) -> list[str]:
    """Two steps per row; more settings may follow."""
    return ["ablate", table, "--out", str(out), "--quiet", *more, "--set", *SCENES]


def results(out: Path, table: str) -> dict:
    """What the command wrote."""
    return json.loads((out / f"table-{table}" / "results.json").read_text())


def trained_run(folder: Path) -> TrainedRun:
    """The run in this directory."""
    config = TrainConfig.from_dict(json.loads((folder / "config.json").read_text()))
    return TrainedRun(config, folder)
