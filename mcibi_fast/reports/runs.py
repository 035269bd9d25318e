"""The report of one run, or of several that are compared."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mcibi_fast
from mcibi_fast.data import SegmentationDataset
from mcibi_fast.data.video import ClipDataset, VideoDataset, source_of
from mcibi_fast.models import Segmentor
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.models.registry import parse
from mcibi_fast.models.weights import ModelSpec, moved_class
from mcibi_fast.recipes import MovingScenesData, NamedData, ScenesData, TrainConfig
from mcibi_fast.recipes.sources import relocated
from mcibi_fast.reports.curves import add_curves
from mcibi_fast.reports.features import add_features
from mcibi_fast.reports.memory import add_memory
from mcibi_fast.reports.page import Report
from mcibi_fast.reports.predictions import add_predictions
from mcibi_fast.reports.samples import Samples, Trained
from mcibi_fast.reports.scores import add_scores
from mcibi_fast.reports.video_strip import add_videos
from mcibi_fast.reports.weight_maps import add_weights
from mcibi_fast.terminal import complain
from mcibi_fast.training.run import Run

IMAGES = 6
_SCORES = {
    "mean_iou": "mIoU",
    "mean_iou_present": "mIoU (present)",
    "pixel_accuracy": "pixel accuracy",
    "mean_class_accuracy": "class accuracy",
}


@dataclass(frozen=True)
class Loaded:
    """A run with its best checkpoint.

    Attributes:
        name: what the report calls it.
        run: its directory.
        config: the settings it was started with.
        model, spec: of the checkpoint.
        step: of the checkpoint.
        metrics: of the evaluation at that step; None if it was not evaluated yet.
    """

    name: str
    run: Run
    config: TrainConfig
    model: Segmentor
    spec: ModelSpec
    step: int
    metrics: dict[str, Any] | None


def build_report(
    runs: Sequence[str | Path],
    *,
    root: str | None = None,
    images: int = IMAGES,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Report:
    """The page: scores, predictions, features, weights, memory, curves, settings, versions.

    Args:
        runs: directories of runs on the same classes; the first one's data is shown.
        root: where the dataset is, if it has moved since the training.
        images: how many to show.
        device: where the models run.
        progress: show how far it is.

    Raises:
        ValueError: a folder is not a run, a run is given twice, or the classes differ (of the
            runs, or in number from the data's).
        FileNotFoundError: a run has no checkpoint.
    """
    loaded = _load(runs, device)
    dataset = _dataset(loaded[0].config, root)
    own = loaded[0].spec.classes
    if len(dataset.classes) != len(own):
        raise ValueError(
            f"report: the data of {runs[0]} have {len(dataset.classes)} classes now, the run has "
            f"{len(own)}; say with --root where the data are that it was trained on"
        )
    moved = moved_class(own, dataset.classes)
    if moved:
        complain(f"warning: {moved}")
    trained = [Trained(each.name, each.model, each.run.history()) for each in loaded]
    samples = Samples(dataset, images)

    models = " and ".join(each.name for each in loaded) if len(loaded) < 4 else "Several models"
    report = Report(f"{models} on {_data_name(loaded[0].config)}")
    if moved:
        report.text(f"Warning: {moved}.")
    _add_summary(report, loaded, dataset)
    ious = {each.name: [_ious(each.metrics)] for each in loaded if each.metrics is not None}
    if ious:
        add_scores(report, dataset.classes, ious)
    add_videos(report, trained, dataset)
    add_predictions(report, trained, samples)
    add_features(report, trained, dataset, progress=progress)
    add_weights(report, trained, samples)
    add_memory(report, trained, dataset)
    add_curves(report, {each.name: [each.history] for each in trained})
    _add_settings(report, loaded)
    _add_versions(report)
    return report


def _load(runs: Sequence[str | Path], device: torch.device | str) -> list[Loaded]:
    paths = [Path(path) for path in runs]
    twice = [path for path, times in Counter(p.resolve() for p in paths).items() if times > 1]
    if twice:
        raise ValueError(f"report: {twice[0]} is given twice")
    configs = []
    for path in paths:
        if not (path / "config.json").is_file():
            raise ValueError(
                f"report: {path} is not the directory of a run (it has no config.json)"
            )
        configs.append(Run(path).settings())
    loaded = [
        _load_run(path, config, name, device)
        for path, config, name in zip(paths, configs, _names(paths, configs), strict=True)
    ]
    first = loaded[0].spec
    for path, each in zip(paths, loaded, strict=True):
        if each.spec.classes != first.classes:
            raise ValueError(
                f"report: {path} has other classes than {paths[0]} "
                f"({_first_difference(each.spec, first)}); only runs on the same classes can be "
                "compared"
            )
    return loaded


def _load_run(path: Path, config: TrainConfig, name: str, device: torch.device | str) -> Loaded:
    run = Run(path)
    directory = run.checkpoint("best") or run.checkpoint("last")
    if directory is None:
        raise FileNotFoundError(
            f"report: {path} holds no checkpoint yet; a run has one after its first epoch"
        )
    with torch.random.fork_rng():  # building a model draws initial weights
        model, spec = load_model(directory)
    model.precision = config.precision  # older checkpoints do not say it
    number = directory.name.removeprefix("step-")
    if not number.isdecimal():
        raise ValueError(f"report: {directory} is not called step-N, as the checkpoints of a run")
    step = int(number)
    metrics = [e["metrics"] for e in run.history() if "metrics" in e and e["step"] == step]
    if metrics and len(metrics[-1]["classes"]) != len(spec.classes):
        raise ValueError(
            f"report: {run.history_file} has scores of {len(metrics[-1]['classes'])} classes, the "
            f"checkpoint has {len(spec.classes)}"
        )
    return Loaded(name, run, config, model.to(device), spec, step, metrics[-1] if metrics else None)


def _first_difference(spec: ModelSpec, first: ModelSpec) -> str:
    if len(spec.classes) != len(first.classes):
        return f"{len(spec.classes)} against {len(first.classes)}"
    pair = next((a, b) for a, b in zip(spec.classes, first.classes, strict=True) if a != b)
    return f"{pair[0]!r} against {pair[1]!r}"


def _names(paths: Sequence[Path], configs: Sequence[TrainConfig]) -> list[str]:
    """What the models are called; followed by the run's folder where two names are equal."""
    titles = [parse(config.model.name).title for config in configs]
    folders = [path.resolve().name for path in paths]
    if len(set(folders)) < len(folders):
        folders = [str(path) for path in paths]
    return [
        title if titles.count(title) == 1 else f"{title} ({folder})"
        for title, folder in zip(titles, folders, strict=True)
    ]


def _dataset(config: TrainConfig, root: str | None) -> SegmentationDataset:
    data = config.data if root is None else relocated(config.data, root)
    return data.dataset(data.val_split)


def _data_name(config: TrainConfig) -> str:
    data = config.data
    if isinstance(data, MovingScenesData):
        return "the built-in moving scenes"
    if isinstance(data, ScenesData):
        return "the built-in scenes"
    return data.name if isinstance(data, NamedData) else Path(data.root).name


def _add_summary(report: Report, loaded: Sequence[Loaded], dataset: SegmentationDataset) -> None:
    data = loaded[0].config.data
    report.text(
        f"{_amount(dataset)} of the split {data.val_split!r}, {len(dataset.classes)} classes. "
        "Scores in percent, of each run's best checkpoint by mIoU."
    )
    rows = []
    for each in loaded:
        scores = each.metrics or {}
        parameters = sum(p.numel() for p in each.model.parameters()) / 1e6
        rows.append(
            [
                each.name,
                *(_percent(scores.get(key)) for key in _SCORES),
                f"{parameters:.2f}",
                str(each.step),
            ]
        )
    report.table(["model", *_SCORES.values(), "parameters, M", "step"], rows)
    report.text(f"Tested by: {_tested_by(loaded)}.")
    if any(each.metrics is None for each in loaded):
        report.text("–: the run was not evaluated at that step yet.")
    if len({_without_root(each.config) for each in loaded}) > 1:
        report.text(
            "The runs differ in their data (see Settings): their scores were measured on "
            "different images and cannot be compared. The pictures are of the first run's data."
        )
    report.legend(dataset.classes, dataset.palette.tolist())


def _tested_by(loaded: Sequence[Loaded]) -> str:
    """How the scores were measured, of each run if they differ in it."""
    words = [str(each.config.inference) for each in loaded]
    if len(set(words)) == 1:
        return words[0]
    return "; ".join(f"{each.name}: {text}" for each, text in zip(loaded, words, strict=True))


def _amount(dataset: SegmentationDataset) -> str:
    if isinstance(dataset, VideoDataset | ClipDataset):
        return f"{len(dataset)} labelled frames of {len(source_of(dataset).videos())} videos"
    return f"{len(dataset)} images"


def _without_root(config: TrainConfig) -> str:
    """The data settings as text, without those in which image and video models differ."""
    return str(config.to_dict()["data"] | {"root": "", "history": 0})


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _ious(metrics: Mapping[str, Any]) -> list[float]:
    ious = [row["iou"] for row in metrics["classes"]]
    return [float("nan") if iou is None else iou for iou in ious]


def _add_settings(report: Report, loaded: Sequence[Loaded]) -> None:
    """Every field, first those in which the runs differ; the others are folded away."""
    report.heading("Settings")
    fields = [_flat(each.config.to_dict()) for each in loaded]
    names = list(dict.fromkeys(name for values in fields for name in values))
    rows = {name: [values.get(name, "–") for values in fields] for name in names}
    differ = [[name, *values] for name, values in rows.items() if len(set(values)) > 1]
    same = [[name, values[0]] for name, values in rows.items() if len(set(values)) == 1]
    if differ:
        report.table(["field", *(each.name for each in loaded)], differ)
    report.table(["field", "value"], same, fold="Fields common to all" if differ else "All fields")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat


def _add_versions(report: Report) -> None:
    info = mcibi_fast.build_info()
    live = [name for name, state in info["backends"].items() if state is True]
    report.heading("Versions")
    report.text("Of the program that made this page; the training may have used others.")
    report.table(
        ["what", "version"],
        [
            ["mcibi_fast", info["version"]],
            ["torch", info["torch_running"]],
            ["Python", platform.python_version()],
            ["device", ", ".join(info["devices"]) or f"CPU, kernels {info['cpu_flavour']}"],
            ["live backends", ", ".join(live)],
        ],
    )
