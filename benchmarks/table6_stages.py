"""Stages of iterative inference, as in the paper's Table 6: ``python -m benchmarks.table6_stages``.

By default it measures scores and time of one to four stages for a model trained on the built-in
scenes (with the settings of ``mcibi-fast demo``, or from a checkpoint), with both mixings of Eq.
17. Each row has the scores of the stage's prediction O and of the weights W with which it gathered
(section 4.2). The trade-off is the paper's: points of mIoU gained per millisecond added, both
compared with the stage before.

With ``--timing`` it measures the cost of each further stage as a share of the first, for an FCN on
ResNet-50 with random weights, 512x512, 150 classes, in both forms, folded and not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cases import Disagreement
from benchmarks.harness import write_all
from benchmarks.machine import interleaved, keep_freed_memory
from benchmarks.results import RESULTS, Row, result_of, table
from mcibi_fast import models, recipes
from mcibi_fast.ablations.stages import STAGES, gathering_logits, trade_off
from mcibi_fast.data import SegmentationDataset
from mcibi_fast.data.loading import evaluation_loader
from mcibi_fast.metrics import ConfusionMatrix
from mcibi_fast.models import Segmentor
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import train


def trained(form: str, epochs: int | None) -> tuple[Segmentor, SegmentationDataset]:
    """A model trained with the demo's settings in this form, and the split to evaluate it on."""
    config = recipes.demo()
    config.model.options["form"] = form
    config.epochs = epochs or config.epochs
    seed_global_generators(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        train(config, folder, progress=False, report=lambda line: print(f"  {line}", flush=True))
        model, _ = load_model(Path(folder) / "checkpoints" / "last")
    return model, scenes(config)


def scenes(config: recipes.TrainConfig) -> SegmentationDataset:
    """The dataset on which the table is measured."""
    return config.data.dataset(config.data.val_split)


@torch.no_grad()
def scores(model: Segmentor, dataset: SegmentationDataset, stage: int, device: str) -> Row:
    """mIoU and pixel accuracy of O and of W in percent; both are upsampled before the argmax."""
    matrices = {
        name: ConfusionMatrix(len(dataset.classes), dataset.ignore_index) for name in ("O", "W")
    }
    for groups in evaluation_loader(dataset, batch_size=10):
        for batch in groups:
            images, labels = batch["image"].to(device), batch["label"].to(device)
            maps = {
                "O": model(images, stages=stage).logits,
                "W": gathering_logits(model, images, stage).softmax(dim=1),
            }
            for name, values in maps.items():
                full = F.interpolate(values, labels.shape[1:], mode="bilinear")
                matrices[name].update(full.argmax(dim=1), labels)
    row = {}
    for name, matrix in matrices.items():
        metrics = matrix.compute()
        row[f"{name}_mIoU"] = 100 * metrics.mean_iou
        row[f"{name}_accuracy"] = 100 * metrics.pixel_accuracy
    return row


def milliseconds(runs: list[Callable[[], Any]], device: str, budget: float) -> list[float]:
    """The time of the fastest call of each: stages differ by little compared with their times."""
    with torch.inference_mode():
        return [1e3 * min(times) for times in interleaved(runs, device, budget)]


def table6(model: Segmentor, dataset: SegmentationDataset, device: str, budget: float) -> list[Row]:
    """One row per mixing and stage."""
    rows: list[Row] = []
    model.to(device)
    image = dataset[0]["image"][None].to(device)
    for mixing in ("paper", "released"):
        model.head.mixing = mixing
        times = milliseconds([lambda s=s: model(image, stages=s) for s in STAGES], device, budget)
        results = [scores(model, dataset, stage, device) for stage in STAGES]
        gains = trade_off([r["O_mIoU"] for r in results], times)
        rows += [
            {"mixing": mixing, "stage": s, "ms": t, **r, "trade_off": gain}
            for s, t, r, gain in zip(STAGES, times, results, gains, strict=True)
        ]
    return rows


def stage_cost(
    device: str, budget: float, size: int, num_classes: int, backbone: str = "resnet50"
) -> list[Row]:
    """One row per form, folded and not: the time of one stage and of each further stage.

    Raises:
        Disagreement: the folded model computes something else.
    """
    g = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, size, size, generator=g).to(device)
    rows: list[Row] = []
    for form in ("paper", "released"):
        model = models.create("fcn_mcibipp", num_classes, backbone, form=form).eval().to(device)
        both = {"no": model, "yes": model.fold()}
        with torch.inference_mode():
            expected, folded = (m(images, stages=2).logits for m in both.values())
        if not torch.allclose(folded, expected, atol=1e-4 * float(expected.abs().max()), rtol=0):
            raise Disagreement(f"{form}: the folded model's logits differ")
        runs: list[Callable[[], Any]] = []
        for m in both.values():
            with torch.inference_mode():
                maps = m.backbone(images)
            runs += [
                lambda m=m: m(images, stages=1),
                lambda h=m.head, f=maps: h(f, stages=1),
                lambda h=m.head, f=maps: h(f, stages=4),
            ]
        times = milliseconds(runs, device, budget)
        for i, folded_or_not in enumerate(both):
            first, one, four = times[3 * i : 3 * i + 3]
            each = (four - one) / 3
            rows.append(
                {
                    "form": form,
                    "folded": folded_or_not,
                    "first_stage_ms": first,
                    "further_stage_ms": each,
                    "share_of_first": each / first,
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--timing", action="store_true", help="measure the cost of a stage with random weights"
    )
    parser.add_argument("--checkpoint", help="a model trained on the built-in scenes")
    parser.add_argument("--epochs", type=int, help="epochs of training (default: the demo's)")
    parser.add_argument("--form", nargs="+", default=["paper", "released"], help="forms to train")
    parser.add_argument("--size", type=int, default=512, help="with --timing: size of the image")
    parser.add_argument("--classes", type=int, default=150, help="with --timing: K")
    parser.add_argument("--budget", type=float, default=30, help="seconds of timing per table")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for CSV and JSON")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    try:
        if options.timing:
            rows = stage_cost(device, options.budget, options.size, options.classes)
        elif options.checkpoint:
            dataset = scenes(recipes.demo())
            model, _ = load_model(options.checkpoint, classes=dataset.classes)
            rows = table6(model, dataset, device, options.budget)
        else:
            rows = []
            for form in options.form:
                part = table6(*trained(form, options.epochs), device, options.budget)
                rows += [{"form": form, **row} for row in part]
    except Disagreement as error:
        print(f"nothing to report: {error}", file=sys.stderr)
        return 1
    print(table(rows, digits=3))
    name = "table6_stage_cost" if options.timing else "table6_stages"
    keys = [key for key in ("form", "folded", "mixing", "stage") if key in rows[0]]
    write_all([result_of(name, device, keys, rows)], options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
