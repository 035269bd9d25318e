"""The report of ``mcibi-fast demo``, and its table and verdict for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mcibi_fast.data.synthetic.scenes import LOOK_ALIKES
from mcibi_fast.models import Segmentor
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.reports.curves import add_curves
from mcibi_fast.reports.features import add_features
from mcibi_fast.reports.memory import add_memory
from mcibi_fast.reports.page import Report
from mcibi_fast.reports.predictions import add_predictions
from mcibi_fast.reports.samples import Samples, Trained
from mcibi_fast.reports.scores import add_scores
from mcibi_fast.reports.weight_maps import add_weights
from mcibi_fast.training.run import Run
from mcibi_fast.training.train import TrainResult

MODELS = {"FCN": "fcn", "FCN + MCIBI++": "fcn_mcibipp"}
HEADER = ("model", "mIoU", "pixel accuracy", "look-alikes mistaken", "seconds")


@dataclass(frozen=True)
class Outcome:
    """One run: the result of its training, and the (K, K) confusion matrix of its last epoch."""

    result: TrainResult
    matrix: Tensor

    @property
    def mean_iou(self) -> float:
        return 100 * (self.result.metrics["mean_iou"] or 0)

    @property
    def run(self) -> Run:
        return Run(self.result.out)


Outcomes = dict[str, list[Outcome]]
"""For each name in `MODELS`, one outcome per seed."""


def table_rows(outcomes: Outcomes) -> list[list[str]]:
    """One row per model: scores of the last epoch in percent, with the spread over seeds."""
    rows = []
    for name, runs in outcomes.items():
        cells = [
            _mean_and_spread([run.mean_iou for run in runs]),
            _mean_and_spread([100 * run.result.metrics["pixel_accuracy"] for run in runs]),
            _mean_and_spread([100 * mistaken(run.matrix, LOOK_ALIKES) for run in runs]),
        ]
        seconds = statistics.mean(run.result.seconds for run in runs)
        rows.append([name, *cells, f"{seconds:.0f}"])
    return rows


def mistaken(matrix: Tensor, pairs: Iterable[tuple[int, int]]) -> float:
    """Share of the pixels of the paired classes that are predicted as the other of their pair."""
    pairs = list(pairs)
    wrong = sum(int(matrix[a, b] + matrix[b, a]) for a, b in pairs)
    return wrong / max(sum(int(matrix[a].sum() + matrix[b].sum()) for a, b in pairs), 1)


def text_table(outcomes: Outcomes) -> str:
    """The table for the terminal."""
    rows = [list(HEADER), *table_rows(outcomes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def verdict(outcomes: Outcomes) -> str:
    """How the two models differ, and whether all seeds agree on it."""
    fcn, ours = ([run.mean_iou for run in outcomes[m]] for m in MODELS)
    gains = [b - a for a, b in zip(fcn, ours, strict=True)]
    if len(gains) == 1:
        return (
            f"MCIBI++ minus FCN: {gains[0]:+.2f} points of mIoU. One seed does not show how far "
            "seeds differ; --seeds 3 does."
        )
    listed = ", ".join(f"{gain:+.2f}" for gain in gains)
    if min(gains) > 0:
        summary = "MCIBI++ is ahead with every seed."
    elif max(gains) < 0:
        summary = "FCN is ahead with every seed."
    else:
        summary = "Seeds disagree: no clear difference here."
    return (
        f"MCIBI++ minus FCN, points of mIoU per seed: {listed}; mean "
        f"{statistics.mean(gains):+.2f}. {summary}"
    )


def build_report(outcomes: Outcomes) -> Report:
    """The page: tables, predictions, scores, features, weights, memory and curves."""
    first = outcomes["FCN"][0]
    config = first.run.settings()
    seeds = len(outcomes["FCN"])
    spread = " ± is the standard deviation over seeds." if seeds > 1 else ""
    report = Report("MCIBI++ on the built-in scenes")
    report.text(
        f"FCN and FCN + MCIBI++ with the same backbone ({config.model.backbone}, from scratch), "
        f"data, schedule ({first.result.steps} steps of {config.batch_size} images), "
        f"augmentation and {'seeds' if seeds > 1 else 'seed'}. Scores are those of the last epoch "
        f"on the validation scenes, in percent, tested by: {config.inference}.{spread}"
    )
    report.table(HEADER, table_rows(outcomes))
    report.text(verdict(outcomes))

    classes = [row["class"] for row in first.result.metrics["classes"]]
    dataset = config.data.dataset(config.data.val_split)
    _add_look_alikes(report, classes, outcomes)
    report.heading("Classes")
    if seeds > 1:
        report.text("Predictions, features and weights are shown for the first seed.")
    report.legend(classes, dataset.palette.tolist())
    trained = [
        Trained(name, _last_model(runs[0]), runs[0].run.history())
        for name, runs in outcomes.items()
    ]
    samples = Samples(dataset, 6)
    add_predictions(report, trained, samples)
    add_scores(report, classes, {n: [_ious(run) for run in runs] for n, runs in outcomes.items()})
    add_features(report, trained, dataset)
    add_weights(report, trained, samples)
    add_memory(report, trained, dataset)
    add_curves(
        report, {name: [run.run.history() for run in runs] for name, runs in outcomes.items()}
    )
    return report


def _add_look_alikes(report: Report, classes: Sequence[str], outcomes: Outcomes) -> None:
    report.heading("Look-alikes")
    report.text(
        "Four pairs of classes are painted by the same code, so only the rest of the image tells "
        "them apart. Share of a pair's pixels that are predicted as the other class, in percent; "
        "lower is better."
    )
    pairs = [f"{classes[a]} / {classes[b]}" for a, b in LOOK_ALIKES]
    rows = [
        [name]
        + [
            _mean_and_spread([100 * mistaken(run.matrix, [pair]) for run in runs])
            for pair in LOOK_ALIKES
        ]
        for name, runs in outcomes.items()
    ]
    report.table(["model", *pairs], rows)


def _last_model(outcome: Outcome) -> Segmentor:
    return load_model(outcome.run.path / "checkpoints" / "last")[0]


def _ious(outcome: Outcome) -> list[float]:
    ious = [row["iou"] for row in outcome.result.metrics["classes"]]
    return [float("nan") if iou is None else iou for iou in ious]


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"
