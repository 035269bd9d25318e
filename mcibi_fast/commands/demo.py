"""``mcibi-fast demo``: FCN with and without MCIBI++ on the built-in scenes."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mcibi_fast import recipes
from mcibi_fast.data.scenes import LOOK_ALIKES
from mcibi_fast.engine.checkpoint import load_model
from mcibi_fast.engine.evaluate import evaluate, predict_labels
from mcibi_fast.engine.files import write_atomically
from mcibi_fast.engine.run import Run
from mcibi_fast.engine.state import seed_global_generators
from mcibi_fast.engine.train import TrainResult, train
from mcibi_fast.models import Segmentor
from mcibi_fast.viz.curves import class_bars, memory_chart, png, training_curves
from mcibi_fast.viz.overlay import colourise, grid, legend, to_pixels
from mcibi_fast.viz.report import Report

MODELS = {"FCN": "fcn", "FCN + MCIBI++": "fcn_mcibipp"}
HEADER = ("model", "mIoU", "pixel accuracy", "seconds")
Results = dict[str, list[TrainResult]]
Runs = dict[str, list[Run]]


def run(args: argparse.Namespace) -> None:
    """Trains both models with each seed, prints a table and writes a report."""
    if args.seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {args.seeds}")
    out = Path(args.out)
    results: Results = {name: [] for name in MODELS}
    for seed in range(args.seeds):
        for name, model in MODELS.items():
            config = recipes.demo(model)
            recipes.apply_settings(config, args.set)
            config.seed = seed
            _leave_cores_to_loaders(config.workers)
            folder = out / f"{model}-seed{seed}"
            if (folder / "config.json").is_file():
                shutil.rmtree(folder)  # an earlier demo's run
            print(f"{name}, seed {seed}")
            seed_global_generators(seed)
            result = train(
                config, folder, progress=not args.quiet, report=lambda line: print(f"  {line}")
            )
            results[name].append(result)
    report = out / "report.html"
    write_atomically(report, build_report(results).html().encode())
    print("\n" + text_table(results) + "\n\n" + verdict(results))
    print(f"report: {report.resolve()}")


def _leave_cores_to_loaders(workers: int) -> None:
    """A thread more than there are cores makes OpenMP's barriers wait, many times over."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (cores or 1) - workers)))


def table_rows(results: Results) -> list[list[str]]:
    """One row per model: scores of the last epoch in percent, with the spread over seeds."""
    rows = []
    for name, runs in results.items():
        cells = [
            _mean_and_spread([100 * (run.metrics[key] or 0) for run in runs])
            for key in ("mean_iou", "pixel_accuracy")
        ]
        seconds = statistics.mean(run.seconds for run in runs)
        rows.append([name, *cells, f"{seconds:.0f}"])
    return rows


def text_table(results: Results) -> str:
    """The table for the terminal."""
    rows = [list(HEADER), *table_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def verdict(results: Results) -> str:
    """What the difference between the two models is, and whether it is one."""
    fcn, ours = ([100 * (run.metrics["mean_iou"] or 0) for run in results[m]] for m in MODELS)
    gains = [b - a for a, b in zip(fcn, ours, strict=True)]
    if len(gains) == 1:
        return (
            f"MCIBI++ minus FCN: {gains[0]:+.2f} points of mIoU. One seed: how far seeds differ "
            "is not known; --seeds 3 shows it."
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


def build_report(results: Results) -> Report:
    """The report with tables, predictions, bars, curves and the memory."""
    runs = {name: [Run(r.out) for r in rs] for name, rs in results.items()}
    config = recipes.TrainConfig.from_dict(runs["FCN"][0].config())
    seeds = len(results["FCN"])
    spread = " ± is the standard deviation over seeds." if seeds > 1 else ""
    report = Report("MCIBI++ on the built-in scenes")
    report.text(
        f"FCN and FCN + MCIBI++ with the same backbone ({config.model.backbone}, from scratch), "
        f"data, schedule ({results['FCN'][0].steps} steps of {config.batch_size} images), "
        f"augmentation and {'seeds' if seeds > 1 else 'seed'}. Scores are those of the last epoch "
        f"on the validation scenes, in percent.{spread}"
    )
    report.table(HEADER, table_rows(results))
    report.text(verdict(results))

    _add_look_alikes(report, config, runs)
    _add_predictions(report, config, runs)
    classes = [row["class"] for row in results["FCN"][0].metrics["classes"]]
    report.heading("IoU per class")
    whiskers = " Whiskers: smallest and largest over seeds." if seeds > 1 else ""
    report.picture(
        png(class_bars(classes, {name: [_ious(r) for r in rs] for name, rs in results.items()})),
        "Intersection over union of each class on the validation scenes." + whiskers,
    )
    report.heading("Training")
    report.picture(
        png(training_curves({name: [r.history() for r in rs] for name, rs in runs.items()})),
        "The loss of MCIBI++ has one more term, 0.4 L_W, so the two losses do not compare.",
    )
    _add_memory(report, runs["FCN + MCIBI++"][0])
    return report


def _add_look_alikes(report: Report, config: recipes.TrainConfig, runs: Runs) -> None:
    dataset = config.data.dataset(config.data.val_split)
    rows = []
    for name, of_model in runs.items():
        matrices = [
            evaluate(_last_model(run), dataset, batch_size=config.eval_batch_size).matrix
            for run in of_model
        ]
        cells = [
            _mean_and_spread([100 * confused(matrix, a, b) for matrix in matrices])
            for a, b in LOOK_ALIKES
        ]
        rows.append([name, *cells])
    report.heading("Look-alikes")
    report.text(
        "Four pairs of classes are painted by the same code, so that only the rest of the image "
        "tells them apart. Share of a pair's pixels that were given to the other class, in "
        "percent; less is better."
    )
    pairs = [f"{dataset.classes[a]} / {dataset.classes[b]}" for a, b in LOOK_ALIKES]
    report.table(["model", *pairs], rows)


def confused(matrix: Tensor, a: int, b: int) -> float:
    """Share of the ground truth of classes a and b that was predicted as the other of the two."""
    return float((matrix[a, b] + matrix[b, a]) / (matrix[a].sum() + matrix[b].sum()))


def _last_model(run: Run) -> Segmentor:
    return load_model(run.path / "checkpoints" / "last")[0]


def _add_predictions(report: Report, config: recipes.TrainConfig, runs: Runs) -> None:
    dataset = config.data.dataset(config.data.val_split)
    palette = dataset.palette
    models = [_last_model(of_model[0]) for of_model in runs.values()]
    rows, names = [], []
    # Spread evenly over the split, not chosen by the result.
    for index in np.linspace(0, len(dataset) - 1, 6).astype(int).tolist():
        sample = dataset[index]
        image, label = sample["image"], sample["label"]
        with torch.no_grad():
            size = (label.shape[0], label.shape[1])
            predictions = [predict_labels(model, image[None], size)[0] for model in models]
        pixels = to_pixels(image, dataset.mean, dataset.std)
        maps = [colourise(values.numpy(), palette) for values in (label, *predictions)]
        rows.append([_enlarged(picture) for picture in (pixels, *maps)])
        names.append(sample["name"])
    report.heading("Predictions")
    report.picture(
        grid(rows, columns=["image", "ground truth", *runs], captions=names),
        "Validation scenes at even distances through the split, first seed.",
    )
    report.picture(legend(dataset.classes, palette), "Colours of the classes.")


def _add_memory(report: Report, run: Run) -> None:
    model, spec = load_model(run.path / "checkpoints" / "last")
    memory = model.memory.memory.numpy()
    report.heading("What the memory holds")
    report.picture(
        png(memory_chart(memory, spec.classes, np.array(spec.palette, np.uint8))),
        "Mean and standard deviation that represent each class (Eqs. 6-9), first seed.",
    )


def _ious(result: TrainResult) -> list[float]:
    ious = [row["iou"] for row in result.metrics["classes"]]
    return [float("nan") if iou is None else iou for iou in ious]


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def _enlarged(picture: np.ndarray) -> np.ndarray:
    """Small scenes a few times as large, pixel by pixel."""
    factor = max(1, round(240 / picture.shape[1]))
    return picture.repeat(factor, 0).repeat(factor, 1)
