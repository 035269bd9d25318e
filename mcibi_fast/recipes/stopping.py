"""When a training ends before its last epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mcibi_fast.errors import did_you_mean
from mcibi_fast.recipes.parts import check_range

METRICS = ("mean_iou", "mean_iou_present", "pixel_accuracy", "mean_class_accuracy")
FOREGROUND = tuple(f"foreground_{name}" for name in ("iou", "dice", "precision", "recall"))


@dataclass
class StoppingConfig:
    """When a training ends before its last epoch.

    Attributes:
        patience: number of evaluations in a row without an improvement after which it ends; None
            never ends early. The schedule of the learning rate is that of all epochs.
        metric: what should improve: mean_iou, mean_iou_present, pixel_accuracy,
            mean_class_accuracy; of two classes also foreground_iou, foreground_dice,
            foreground_precision or foreground_recall. (The best checkpoint is that of the best
            mean_iou in any case.)
        min_delta: an improvement is more than this above the best so far.
    """

    patience: int | None = None
    metric: str = "mean_iou"
    min_delta: float = 0.0

    def validate(self) -> None:
        """Raises ValueError, naming the field, for settings that make no sense."""
        if self.patience is not None:
            check_range("stopping.patience", self.patience, "at least 1", least=1)
        check_range("stopping.min_delta", self.min_delta, "0 or more", least=0)
        if self.metric not in (*METRICS, *FOREGROUND):
            hint = did_you_mean(self.metric, [*METRICS, *FOREGROUND], METRICS)
            raise ValueError(f"stopping.metric: no metric {self.metric!r}; {hint}")

    def check_classes(self, count: int) -> None:
        """Raises ValueError for a metric of two classes, if there are more."""
        if self.metric in FOREGROUND and count != 2:
            raise ValueError(
                f"stopping.metric: {self.metric} is for two classes; the data have {count}"
            )

    def is_over(self, scores: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a training ends, given the scores of its evaluations so far, in order."""
        if self.patience is None:
            return False
        best, since = -math.inf, 0
        for each in scores:
            value = each.get(self.metric)
            value = -math.inf if value is None else value
            since = 0 if value > best + self.min_delta else since + 1
            best = max(best, value) if since == 0 else best
        return since >= self.patience
