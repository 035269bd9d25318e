"""Trained models of the rows: trained, continued or found finished, and measured once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcibi_fast.ablations.table import Row, Scores
from mcibi_fast.data import SegmentationDataset
from mcibi_fast.files import write_atomically
from mcibi_fast.inference.evaluate import evaluate
from mcibi_fast.metrics import ConfusionMatrix, SegmentationMetrics
from mcibi_fast.models import Segmentor
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.recipes import TrainConfig
from mcibi_fast.training.environment import environment
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.threads import leave_cores_to_loaders
from mcibi_fast.training.train import train
from mcibi_fast.untrusted import read_json

MEASURED = "measured.json"
_TRAINING = "training"
_REMARKS = "remarks"


class TrainedRun:
    """One run's directory, with what was measured of its model in ``measured.json``.

    Args:
        config: of the run.
        folder: its directory.
        test_root: the folder of the second dataset, where a table has one.
        progress: show bars.

    Raises:
        ValueError: the directory holds a run of another configuration.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        *,
        test_root: str | None = None,
        progress: bool = False,
    ) -> None:
        self.config, self.folder = config, folder
        self.test_root = test_root
        self.progress = progress
        self.is_main = os.environ.get("RANK", "0") == "0"
        file = folder / MEASURED
        self.stored: dict[str, Any] = read_json(file) if file.is_file() else {}
        if Run(folder).checkpoint("last") is not None:
            self._refuse_another_configuration()

    @property
    def environment(self) -> dict[str, Any]:
        """Commit, versions, device and threads of the training."""
        return self.stored["environment"]

    @property
    def remarks(self) -> list[str]:
        """What measurements had to say of how they were made."""
        return self.stored.get(_REMARKS, [])

    def remark(self, text: str) -> None:
        """Keeps a remark, which stands under the table; written with the next scores."""
        self.stored[_REMARKS] = list(dict.fromkeys([*self.remarks, text]))

    def is_trained(self) -> bool:
        """Whether the training came to its end."""
        return _TRAINING in self.stored

    def has(self, row: Row) -> bool:
        """Whether all that the row shows is measured."""
        return self.is_trained() and (row.measure is None or _key(row) in self.stored)

    def train(self, report: Callable[[str], None]) -> None:
        """Trains the model, from the last checkpoint on where there is one.

        Raises:
            ValueError, TrainingError, OSError, KeyboardInterrupt: as `training.train.train`.
        """
        leave_cores_to_loaders(self.config.workers)
        # Each process its own dropout; the weights of the first are broadcast.
        seed_global_generators(self.config.seed + int(os.environ.get("RANK", "0")))
        result = train(
            self.config,
            self.folder,
            resume=Run(self.folder).checkpoint("last") is not None,
            progress=self.progress,
            report=report,
        )
        scores = {
            "mIoU": 100 * (result.metrics["mean_iou"] or 0.0),
            "pixel_accuracy": 100 * (result.metrics["pixel_accuracy"] or 0.0),
            "seconds": result.seconds,
        }
        self.stored["environment"] = environment(str(self.device()))
        self._store(_TRAINING, {"": scores})

    def scores(self, row: Row) -> Scores:
        """What the row shows, measured now where it was not yet."""
        training = self.stored[_TRAINING][""]
        if row.measure is None:
            return training
        if _key(row) not in self.stored:
            self._store(_key(row), row.measure(self))
        return training | self.stored[_key(row)][row.part]

    def model(self, **options: Any) -> Segmentor:
        """The model after the last step, in evaluation mode, where it is to be evaluated.

        Args:
            options: of the model, in place of those that it was trained with.
        """
        model, _ = load_model(self.folder / "checkpoints" / "last", **options)
        return model.to(self.device())

    def validation(self) -> SegmentationDataset:
        """The split that the training was evaluated on."""
        return self.config.data.dataset(self.config.data.val_split)

    def evaluate(self, model: Any, dataset: SegmentationDataset, **changes: Any) -> ConfusionMatrix:
        """The confusion matrix, as the training evaluates.

        Args:
            model: a `Segmentor` in evaluation mode, or what stands for one.
            dataset: what it is evaluated on.
            changes: fields of `recipes.InferenceConfig` that are not the run's.
        """
        return evaluate(
            model,
            dataset,
            inference=replace(self.config.inference, **changes),
            batch_size=self.config.eval_batch_size,
            workers=self.config.workers,
            accelerator=self.accelerator(),
            progress=self.progress,
        )

    def device(self) -> Any:
        """Where the run's models are trained and evaluated."""
        return self.accelerator().device

    def accelerator(self) -> Any:
        """As the training's: its device and mixed precision."""
        from accelerate import Accelerator

        config = self.config
        return Accelerator(mixed_precision=config.mixed_precision, cpu=config.device == "cpu")

    def _store(self, key: str, parts: dict[str, Scores]) -> None:
        self.stored[key] = parts
        if self.is_main:
            content = json.dumps(self.stored, indent=2) + "\n"
            write_atomically(self.folder / MEASURED, content.encode())

    def _refuse_another_configuration(self) -> None:
        there = Run(self.folder).settings().to_dict()
        here = self.config.to_dict()
        weights = there["loss"]["class_weights"]
        if here["loss"]["class_weights"] == "balanced" and weights is not None:
            here["loss"]["class_weights"] = weights  # a run writes the numbers down
        differing = _first_difference(there, here)
        if differing:
            name, old, new = differing
            raise ValueError(
                f"--out: {self.folder} holds a run with {name} {old!r}, now it is {new!r}; give "
                "the same settings as then, or another --out"
            )


def percent(metrics: SegmentationMetrics) -> Scores:
    """mIoU and pixel accuracy in percent."""
    return {"mIoU": 100 * metrics.mean_iou, "pixel_accuracy": 100 * metrics.pixel_accuracy}


def _key(row: Row) -> str:
    assert row.measure is not None
    return row.measure.__name__


def _first_difference(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    for name in [*old, *(name for name in new if name not in old)]:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            if difference := _first_difference(a, b, f"{prefix}{name}."):
                return difference
        # A configuration from a file has lists where tuples were.
        elif json.dumps(a) != json.dumps(b):
            return prefix + name, a, b
    return None
