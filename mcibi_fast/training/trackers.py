"""Where a run's losses and scores go besides its history: TensorBoard, CSV, accelerate's trackers.

Only the main process writes. A resumed run continues its own: rows of a CSV after the checkpoint
are dropped, and Weights & Biases and MLflow continue the run that ``trackers.json`` names. What
they refuse to take a second time is equal to what they have, as a resumed run repeats its steps.
"""

from __future__ import annotations

import csv
import io
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from mcibi_fast import extras
from mcibi_fast.errors import did_you_mean
from mcibi_fast.files import append_line, write_atomically
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.training.run import Run
from mcibi_fast.training.scalars import ScalarLog
from mcibi_fast.untrusted import shorten

OWN = ("tensorboard", "csv")
PROJECT = "mcibi_fast"
_HEADER = "step,name,value"


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for an unknown tracker, and MissingExtra for one that is not installed."""
    known = [*OWN, *(str(each) for each in LoggerType if each != LoggerType.ALL)]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, sorted({*known}))
            raise ValueError(f"trackers: no tracker {name!r}; {hint}")
        if name in ("wandb", "mlflow"):
            extras.require(f"trackers: {name}", name)
        elif name not in OWN and name not in map(str, get_available_trackers()):
            raise ValueError(f"trackers: {name} needs its package: pip install {name}")


class Loggers:
    """All places that a run's numbers go to.

    Args:
        config: the run's configuration; trackers keep its fields, with dots in their names.
        run: its directory, whose name is that of the trackers' runs.
        accelerator: of the main process.
        step: the step from which it goes on; what was written after it is void.
        report: takes a line about a tracker that fails. The training goes on without it.

    Raises:
        ValueError: a tracker cannot be started.
        OSError: a file cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        accelerator: Accelerator,
        *,
        step: int,
        report: Callable[[str], None],
    ) -> None:
        self.report, self.accelerator = report, accelerator
        self.files: list[ScalarLog | CSVLog] = []
        if "tensorboard" in config.trackers:
            self.files.append(ScalarLog(run.tensorboard, first_step=step + 1))
        if "csv" in config.trackers:
            self.files.append(CSVLog(run.scalars, step=step))
        self.trackers: dict[str, Any] = {}
        names = [name for name in dict.fromkeys(config.trackers) if name not in OWN]
        if names:
            ids = run.trackers()
            for name in names:
                self.trackers[name] = self._started(name, config, run, ids)
            run.keep_trackers(ids)

    def _started(self, name: str, config: TrainConfig, run: Run, ids: dict[str, str]) -> Any:
        options: dict[str, Any] = {}
        folder = run.path.resolve()
        if name == "wandb":
            ids.setdefault(name, uuid.uuid4().hex[:12])
            options = {"name": folder.name, "dir": str(folder), "id": ids[name], "resume": "allow"}
        elif name == "mlflow":
            options = {"run_name": folder.name, "run_id": ids.get(name)}
        accelerator = self.accelerator
        accelerator.log_with = [LoggerType(name)]
        accelerator.project_configuration.set_directories(str(folder))
        try:
            accelerator.init_trackers(PROJECT, flat(config), {name: options})
        except Exception as error:  # any library, which may ask a server
            raise ValueError(f"trackers: {name} cannot start: {shorten(error)}") from error
        (tracker,) = accelerator.trackers
        accelerator.trackers = []
        if name == "mlflow":
            ids[name] = tracker.tracker.info.run_id
        return tracker

    def add(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Writes values of one step, named by the prefix and their key.

        Raises:
            OSError: a file could not be written.
        """
        for file in self.files:
            file.add(step, values, prefix)
        named = {prefix + name: float(value) for name, value in values.items()}
        for name, tracker in [*self.trackers.items()]:
            try:
                tracker.log(named, step=step)
            except Exception as error:
                del self.trackers[name]
                self.report(
                    f"warning: trackers: {name} failed at step {step}, the run goes on without it: "
                    f"{shorten(error)}"
                )

    def close(self) -> None:
        """Ends the trackers' runs and closes the files."""
        for name, tracker in self.trackers.items():
            try:
                tracker.finish()
            except Exception as error:
                self.report(f"warning: trackers: {name} could not end: {shorten(error)}")
        for file in self.files:
            file.close()


class CSVLog:
    """Rows ``step,name,value``, each appended as it comes.

    Args:
        path: the file; rows after ``step`` are dropped, as of a run that was killed.
        step: of the checkpoint.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        kept = []
        if step and path.is_file():
            for row in path.read_text().splitlines()[1:]:
                number = row.partition(",")[0]
                if number.isdecimal() and int(number) <= step:
                    kept.append(row)
        write_atomically(path, "".join(f"{row}\n" for row in [_HEADER, *kept]).encode())

    def add(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Appends a row for each value."""
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerows((step, prefix + name, float(value)) for name, value in values.items())
        append_line(self.path, rows.getvalue().rstrip("\n"))

    def close(self) -> None:
        """Does nothing: each row is written at once."""


def flat(config: TrainConfig) -> dict[str, Any]:
    """The configuration's fields by names with dots; lists and the like as text."""
    values: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            plain = value is None or isinstance(value, (bool, int, float, str))
            values[prefix] = value if plain else str(value)

    walk("", asdict(config))
    return values
