"""An index of the runs in a folder: their scores in one table, their curves side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mcibi_fast.models.registry import parse
from mcibi_fast.recipes import TrainConfig
from mcibi_fast.reports.curves import LINES, add_curves
from mcibi_fast.reports.page import Report
from mcibi_fast.training.run import Run

_DEPTH = 3  # folders below the given one that are looked through
_SCORES = {"mean_iou": "mIoU", "pixel_accuracy": "pixel accuracy"}


@dataclass(frozen=True)
class _Entry:
    """A run as the index shows it: its path below the folder, settings and history."""

    name: str
    path: Path
    config: TrainConfig
    history: list[dict[str, Any]]

    @property
    def best(self) -> dict[str, Any]:
        """The scores of the evaluation with the best mIoU; empty before the first."""
        scores = [entry["metrics"] for entry in self.history if "metrics" in entry]
        return max(scores, key=_mean_iou, default={})

    @property
    def steps(self) -> int:
        return max((entry.get("step", 0) for entry in self.history), default=0)


def _mean_iou(scores: dict[str, Any]) -> float:
    """For sorting: below all others if there is none, or NaN."""
    value = scores.get("mean_iou")
    return value if value is not None and value >= 0 else -1.0


def find_runs(folder: str | Path) -> list[Path]:
    """The runs in a folder and up to three levels below it, sorted; links are not followed.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"report: {folder} is not a folder")
    return sorted(_runs(folder, _DEPTH))


def _runs(folder: Path, depth: int) -> Iterator[Path]:
    for entry in os.scandir(folder):
        if not entry.is_dir(follow_symlinks=False):
            continue
        path = Path(entry.path)
        if (path / "config.json").is_file():
            yield path
        elif depth > 1:
            yield from _runs(path, depth - 1)


def build_index(folder: str | Path) -> Report:
    """The page ``index.html`` of a folder of runs. No model is loaded and no data are needed.

    Args:
        folder: searched by `find_runs`. A run that cannot be read is named with the reason.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no run.
    """
    folder = Path(folder)
    entries, unreadable = [], []
    for path in find_runs(folder):
        name = path.relative_to(folder).as_posix()
        try:
            run = Run(path)
            if "library_name" in run.config():
                continue  # a model saved for the Hub
            entries.append(_Entry(name, path, run.settings(), run.history()))
        except (OSError, ValueError) as error:
            unreadable.append([name, str(error)])
    if not entries and not unreadable:
        raise ValueError(f"report: {folder} holds no runs (folders with a config.json)")
    entries.sort(key=lambda entry: _mean_iou(entry.best), reverse=True)

    report = Report(f"Runs in {folder.resolve().name}")
    report.text(
        "Scores in percent on the validation split, at the best mIoU of each run. Scores can be "
        "compared only between runs on the same data."
    )
    header = ["run", "model", "backbone", "data", "seed", "step", *_SCORES.values()]
    report.table(header, [_row(entry) for entry in entries])
    pages = [
        (f"Report of {entry.name}", quote(f"{entry.name}/report.html"))
        for entry in entries
        if (entry.path / "report.html").is_file()
    ]
    if pages:
        report.links(pages)
    if unreadable:
        report.heading("Cannot be read")
        report.table(["run", "reason"], unreadable)
    shown = [entry for entry in entries if entry.history][:LINES]
    if shown:
        add_curves(report, {entry.name: [entry.history] for entry in shown})
        if len(shown) < len(entries):
            report.text(f"The curves are of the {len(shown)} runs with the best mIoU.")
    return report


def _row(entry: _Entry) -> list[str]:
    config = entry.config
    data = config.data
    name = getattr(data, "name", "") or type(data).__name__.removesuffix("Data").lower()
    scores = [entry.best.get(key) for key in _SCORES]
    return [
        entry.name,
        parse(config.model.name).title,
        config.model.backbone,
        name,
        str(config.seed),
        str(entry.steps),
        *("–" if score is None else f"{100 * score:.2f}" for score in scores),
    ]
