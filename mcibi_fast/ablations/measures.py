"""What is measured on a trained model beyond the last evaluation of its training.

Each function takes a trained run and returns scores by part; rows say which part they show.
"""

from __future__ import annotations

import torch

from mcibi_fast.ablations.runs import TrainedRun
from mcibi_fast.ablations.stages import STAGES, StageWeights, fastest, trade_off
from mcibi_fast.ablations.table import Scores
from mcibi_fast.metrics import ConfusionMatrix
from mcibi_fast.recipes import NamedData

TENTH = 10  # jumpsuits in LIP, torso skin in CIHP


def four_stages(run: TrainedRun) -> dict[str, Scores]:
    """One to four stages: scores of O and of the weights W that gathered for it, and time."""
    model, dataset = run.model(), run.validation()
    image = dataset[0]["image"][None].to(run.device())
    times = [1e3 * seconds for seconds in fastest(model, image)]
    parts: dict[str, Scores] = {}
    for stage, milliseconds in zip(STAGES, times, strict=True):
        model.head.stages = stage
        weights = percent(run.evaluate(StageWeights(model, stage), dataset))
        parts[f"stages={stage}"] = {
            **percent(run.evaluate(model, dataset)),
            "ms": milliseconds,
            **{f"W_{name}": value for name, value in weights.items()},
        }
    gains = trade_off([part["mIoU"] for part in parts.values()], times)
    for part, gain in zip(parts.values(), gains, strict=True):
        if gain is not None:
            part["trade_off"] = gain
    return parts


def lip_and_cihp(run: TrainedRun) -> dict[str, Scores]:
    """LIP's validation split and CIHP's, at LIP's test size."""
    data = run.config.data
    assert isinstance(data, NamedData) and run.test_root is not None
    cihp = NamedData("cihp", root=run.test_root, size=data.size)
    model = run.model()
    parts = {}
    for name, dataset in (("LIP", run.validation()), ("CIHP", cihp.dataset("val"))):
        confusion = run.evaluate(model, dataset)
        without = without_class(confusion, TENTH)
        parts[f"tested on {name}"] = percent(confusion) | {"mIoU_without_10": 100 * without}
    return parts


def percent(confusion: ConfusionMatrix) -> Scores:
    """mIoU and pixel accuracy in percent."""
    metrics = confusion.compute()
    return {"mIoU": 100 * metrics.mean_iou, "pixel_accuracy": 100 * metrics.pixel_accuracy}


def without_class(confusion: ConfusionMatrix, index: int) -> float:
    """The mean IoU of all other classes, where this one's pixels count no more than ignored ones.

    A pixel of another class that is taken for this one still is a mistake.
    """
    rest = ConfusionMatrix(confusion.num_classes, confusion.ignore_index)
    rest.matrix = confusion.matrix.clone()
    rest.matrix[index] = 0
    keep = torch.arange(confusion.num_classes) != index
    return float(rest.compute().iou[keep].nanmean())
