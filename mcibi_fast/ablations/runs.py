"""Trained models of the rows: each is trained, continued or found finished, and measured once."""

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
from mcibi_fast.training.precision import with_precision
from mcibi_fast.training.processes import start_accelerator
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.threads import leave_cores_to_loaders
from mcibi_fast.training.train import train
from mcibi_fast.untrusted import read_json

MEASURED = "measured.json"
_TRAINING = "training"
_REMARKS = "remarks"


class TrainedRun:
    """A run's directory; what was measured on its model is in its ``measured.json``.

    Args:
        config: the run's configuration.
        folder: its directory.
        test_root: the folder of the second dataset, if the table has one.
        progress: show how far it is.

    Raises:
        ValueError: the directory holds a run with another configuration.
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
            stored = Run(folder).settings()  # what the machine decided when it began
            self.config = replace(config, mixed_precision=stored.precision, speed=stored.speed)

    @property
    def environment(self) -> dict[str, Any]:
        """The commit, versions, device and number of threads of the training."""
        return self.stored["environment"]

    @property
    def remarks(self) -> list[str]:
        """Remarks on how the measurements were made."""
        return self.stored.get(_REMARKS, [])

    def remark(self, text: str) -> None:
        """Keeps a remark to be printed under the table; it is stored with the next scores."""
        self.stored[_REMARKS] = list(dict.fromkeys([*self.remarks, text]))

    def is_trained(self) -> bool:
        """Whether the training has finished."""
        return _TRAINING in self.stored

    def has(self, row: Row) -> bool:
        """Whether everything that the row shows has been measured."""
        return self.is_trained() and (row.measure is None or _key(row) in self.stored)

    def train(self, report: Callable[[str], None]) -> None:
        """Trains the model, continuing from the last checkpoint if there is one.

        Raises:
            ValueError, TrainingError, OSError, KeyboardInterrupt: as in `training.train.train`.
        """
        self.config = with_precision(self.config, report)
        leave_cores_to_loaders(self.config.workers)
        # Each process draws its own dropout; the first one's initial weights go to all.
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
        """The scores that the row shows, measured now if they were not measured before."""
        training = self.stored[_TRAINING][""]
        if row.measure is None:
            return training
        if _key(row) not in self.stored:
            self._store(_key(row), row.measure(self))
        return training | self.stored[_key(row)][row.part]

    def model(self, **options: Any) -> Segmentor:
        """The model after the last step, in evaluation mode, on the device for evaluation.

        Args:
            options: options of the model that replace those it was trained with.
        """
        model, _ = load_model(self.folder / "checkpoints" / "last", **options)
        return model.to(self.device())

    def validation(self) -> SegmentationDataset:
        """The split that the training was evaluated on."""
        return self.config.data.dataset(self.config.data.val_split)

    def evaluate(self, model: Any, dataset: SegmentationDataset, **changes: Any) -> ConfusionMatrix:
        """The confusion matrix, evaluated as in training.

        Args:
            model: a `Segmentor` in evaluation mode, or a wrapper around one.
            dataset: the dataset it is evaluated on.
            changes: fields of `recipes.InferenceConfig` that differ from the run's.
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
        """The device on which the run's model is trained and evaluated."""
        return self.accelerator().device

    def accelerator(self) -> Any:
        """An accelerator with the training's device and mixed precision."""
        config = self.config
        return start_accelerator(mixed_precision=config.mixed_precision, cpu=config.device == "cpu")

    def _store(self, key: str, parts: dict[str, Scores]) -> None:
        self.stored[key] = parts
        if self.is_main:
            content = json.dumps(self.stored, indent=2) + "\n"
            write_atomically(self.folder / MEASURED, content.encode())

    def _refuse_another_configuration(self) -> None:
        if differing := _another_configuration(self.folder, self.config):
            name, old, new = differing
            raise ValueError(
                f"--out: {self.folder} holds a run with {name} {old!r}, now it is {new!r}; give "
                "the same settings as before, or another --out"
            )


def holds(folder: Path, config: TrainConfig) -> bool:
    """Whether a directory holds a run with this configuration."""
    begun = Run(folder).checkpoint("last") is not None
    return begun and _another_configuration(folder, config) is None


def _another_configuration(folder: Path, config: TrainConfig) -> tuple[str, Any, Any] | None:
    """The first field in which a run's configuration is another, its old and its new value."""
    there, here = Run(folder).settings().to_dict(), config.to_dict()
    here["speed"] = there["speed"]  # does not make it another experiment
    if here["mixed_precision"] in ("auto", "measured"):
        here["mixed_precision"] = there["mixed_precision"]
    weights = there["loss"]["class_weights"]
    if here["loss"]["class_weights"] == "balanced" and weights is not None:
        here["loss"]["class_weights"] = weights  # a run stores the computed numbers
    return _first_difference(there, here)


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
        # A configuration read from a file has lists instead of tuples.
        elif json.dumps(a) != json.dumps(b):
            return prefix + name, a, b
    return None
