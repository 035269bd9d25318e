"""A run's directory: configuration, checkpoints, history.

::

    config.json             the configuration
    data.json               what the data were: classes, numbers of images, hashes of their names
    label_classes.json      with class-balanced sampling: the classes in each training image
    trackers.json           what trackers need to continue their own runs
    history.jsonl           one line per reading of the loss and per evaluation
    checkpoints/step-*/     model.safetensors, state.pt
    checkpoints/last, best  links to two of them; the others are removed
    tensorboard/, scalars.csv
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mcibi_fast.files import (
    append_line,
    link_atomically,
    write_atomically,
    write_directory_atomically,
)
from mcibi_fast.models import Segmentor
from mcibi_fast.models.weights import WEIGHTS
from mcibi_fast.nn import GaussianMemory
from mcibi_fast.recipes.config import TrainConfig, read_settings, read_stored
from mcibi_fast.training.history import read_history
from mcibi_fast.typed import fits
from mcibi_fast.untrusted import parse_json, read_bytes, read_json, read_torch

STATE = "state.pt"
DATA = "data.json"
LABEL_CLASSES = "label_classes.json"
TRACKERS = "trackers.json"
_OF_A_SPLIT = ("images", "names")
_STATE_ENTRIES = {
    "step",
    "seconds",
    "weights",
    "optimizer",
    "scaler",
    "transient_buffers",
    "random",
}


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished run.

    Attributes:
        out: the run's directory.
        steps: optimizer steps.
        seconds: time of training and evaluation, over all parts of a resumed run.
        metrics: scores of the last evaluation (see `SegmentationMetrics.as_dict`).
        best: scores of the evaluation with the best mIoU.
    """

    out: Path
    steps: int
    seconds: float
    metrics: dict[str, Any]
    best: dict[str, Any]


class Run:
    """Reads and writes a run's directory.

    Args:
        path: the directory; made when something is first written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.history_file = self.path / "history.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.scalars = self.path / "scalars.csv"

    def start(self, config: dict[str, Any]) -> None:
        """Makes the directory for a new run.

        Raises:
            ValueError: it already holds a run.
        """
        if self.checkpoint("last") is not None:
            raise ValueError(
                f"out: {self.path} already holds a run; continue it with --resume, or choose "
                "another directory"
            )
        self._refuse_link()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "config.json", json.dumps(config, indent=2).encode())
        for file in (self.history_file, self.scalars, self.path / LABEL_CLASSES):
            file.unlink(missing_ok=True)
        (self.path / TRACKERS).unlink(missing_ok=True)

    def config(self) -> dict[str, Any]:
        """The configuration that the run was started with.

        Raises:
            ValueError: the directory holds no run, or the file is not one of a run's.
        """
        return read_stored(self.path)

    def keep_data(self, data: dict[str, Any]) -> None:
        """Keeps what the data are, see `training.data.describe`."""
        write_atomically(self.path / DATA, json.dumps(data, indent=2).encode())

    def data(self) -> dict[str, Any] | None:
        """What the data were when the run began; None if a run of an earlier version does not say.

        Raises:
            ValueError: the file is not one of a run's.
        """
        file = self.path / DATA
        try:
            data = read_json(file)
        except FileNotFoundError:
            return None
        try:
            splits = [data[split][what] for split in ("train", "val") for what in _OF_A_SPLIT]
            good = fits(data["classes"], list[str]) and all(map(fits, splits, [int, str] * 2))
        except (KeyError, TypeError):
            good = False
        if not good:
            raise ValueError(f"{file}: not a description of a run's data")
        return data

    def keep_label_classes(self, names: str, classes: list[list[int]]) -> None:
        """Keeps the classes in each training image, and the hash of the images' names."""
        content = json.dumps({"names": names, "classes": classes})
        write_atomically(self.path / LABEL_CLASSES, content.encode())

    def label_classes(self, names: str, images: int, num_classes: int) -> list[list[int]] | None:
        """What `keep_label_classes` kept; None if nothing of use is there."""
        try:
            content = parse_json(read_bytes(self.path / LABEL_CLASSES, "MAX_HISTORY_BYTES"))
            found = content["classes"]
            good = content["names"] == names and fits(found, list[list[int]])
            good = good and len(found) == images
            good = good and all(0 <= k < num_classes for each in found for k in each)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if good else None

    def keep_trackers(self, ids: dict[str, str]) -> None:
        """Keeps by which names trackers know this run."""
        write_atomically(self.path / TRACKERS, json.dumps(ids, indent=2).encode())

    def trackers(self) -> dict[str, str]:
        """What `keep_trackers` kept; nothing if the file is missing or damaged."""
        try:
            ids = read_json(self.path / TRACKERS)
        except (OSError, ValueError):
            return {}
        return {k: v for k, v in ids.items() if type(v) is str} if isinstance(ids, dict) else {}

    def settings(self) -> TrainConfig:
        """The configuration as a training takes it.

        Raises:
            ValueError: as in `config`, or this version cannot use the configuration.
        """
        return read_settings(self.path)

    def checkpoint(self, name: str) -> Path | None:
        """The directory of the checkpoint "last" or "best", or None."""
        link = self.checkpoints / name
        return link.resolve() if (link / WEIGHTS).is_file() else None

    def kept(self) -> str:
        """What is left of a training that was stopped."""
        last = self.checkpoint("last")
        if last is None:
            return "no checkpoint yet"
        return f"{last.name} is kept; continue with --resume {self.path}"

    def save(self, step: int, weights: bytes, state: dict[str, Any]) -> None:
        """Writes a checkpoint and makes it the last.

        "last" keeps pointing to the previous checkpoint until the new one is complete, so a crash
        or a full disk loses nothing.

        Raises:
            OSError: it could not be written; the message says what is left.
        """
        packed = io.BytesIO()
        torch.save(state, packed)
        directory = self.checkpoints / f"step-{step:08d}"
        try:
            write_directory_atomically(directory, {WEIGHTS: weights, STATE: packed.getvalue()})
            link_atomically(self.checkpoints / "last", directory.name)
        except OSError as error:
            last = self.checkpoint("last")
            message = f"checkpoint of step {step} not written: {error.strerror}; " + (
                f"the one before is intact: {last}" if last else "there is none before it"
            )
            raise OSError(error.errno, message) from error
        self._remove_unnamed()

    def mark_best(self, step: int) -> None:
        """Makes the checkpoint of that step the best."""
        link_atomically(self.checkpoints / "best", f"step-{step:08d}")
        self._remove_unnamed()

    def weights(self) -> Path:
        """The last checkpoint's weights file. Raises ValueError if there is none."""
        directory = self.checkpoint("last")
        if directory is None:
            raise ValueError(f"resume: {self.path} holds no checkpoint yet; start a new run")
        return directory / WEIGHTS

    def load_state(self) -> tuple[Path, dict[str, Any]]:
        """The last checkpoint's weights file and training state.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        weights = self.weights()
        self._refuse_link()
        file = weights.with_name(STATE)
        try:
            state = read_torch(file)
        except ValueError as error:
            raise ValueError(
                f"resume: {file} is damaged: {error}; restore it from a copy, or start a new run"
            ) from error
        if not isinstance(state, dict) or not state.keys() >= _STATE_ENTRIES:
            raise ValueError(f"resume: {file} is no training state")
        return weights, state

    def record(self, **entry: Any) -> None:
        """Appends a line to the history."""
        append_line(self.history_file, json.dumps(entry))

    def record_memory(self, model: Segmentor, *, step: int, epoch: int) -> None:
        """Records the means and deviations that a memory of Gaussians holds."""
        memory = model.memory if model.head.has_memory else None
        if isinstance(memory, GaussianMemory):
            mean, std = memory.memory.t().tolist()
            self.record(step=step, epoch=epoch, memory={"mean": mean, "std": std})

    def history(self) -> list[dict[str, Any]]:
        """All whole lines of the history, in order; see `read_history`."""
        return read_history(self.history_file)

    def rewind(self, step: int) -> None:
        """Drops history after a step: what a killed run wrote after its last checkpoint."""
        kept = [entry for entry in self.history() if entry["step"] <= step]
        lines = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_atomically(self.history_file, lines.encode())

    def _refuse_link(self) -> None:
        """Raises if the folder of checkpoints is a link, so that nothing is removed elsewhere."""
        if self.checkpoints.is_symlink():
            raise ValueError(
                f"{self.checkpoints} is a link, and runs are not written through links; link the "
                "whole directory of the run instead"
            )

    def _remove_unnamed(self) -> None:
        named = {self.checkpoint("last"), self.checkpoint("best")}
        for directory in self.checkpoints.glob("step-*"):
            if directory.resolve() not in named:
                shutil.rmtree(directory, ignore_errors=True)
