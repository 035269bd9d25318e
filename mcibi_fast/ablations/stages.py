"""Stages of coarse-to-fine iterative inference (section 3.5): their weights W and their cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from mcibi_fast.models import SegmentationOutput, Segmentor, SegmentorWrapper

STAGES = (1, 2, 3, 4)


def gathering_logits(model: Segmentor, images: Tensor, stage: int) -> Tensor:
    """The logits of the weights W with which a stage gathers.

    Args:
        model: a model with MCIBI++ in evaluation mode.
        images: (B, 3, H, W).
        stage: the stage, counted from 1.

    Returns:
        (B, K, h, w).
    """
    before = model(images, stages=max(stage - 1, 1))
    head = model.head
    first = before.context_logits if head.weights_from == "cwi" else before.weight_logits
    if stage == 1:
        return first
    return head.next_weights(first, before.logits)


class StageWeights(SegmentorWrapper):
    """A model whose prediction is W, so that W can be evaluated as O is (section 4.2).

    Args:
        model: a model with MCIBI++.
        stage: the stage whose W it predicts.
    """

    def __init__(self, model: Segmentor, stage: int) -> None:
        super().__init__(model)
        self.stage = stage

    def forward(self, images: Tensor) -> SegmentationOutput:
        weights = gathering_logits(self.model, images, self.stage)
        return SegmentationOutput(weights.softmax(dim=1), {})  # Eq. 14 upsamples W itself


@torch.inference_mode()
def fastest(model: Segmentor, images: Tensor, budget: float = 3.0) -> list[float]:
    """Seconds of the fastest pass with each number of `STAGES`.

    The numbers of stages take turns, with at least five passes each. The fastest pass is taken, not
    the median, because the differences between stages are small compared with their times.

    Args:
        model: a model with MCIBI++ in evaluation mode.
        images: (B, 3, H, W).
        budget: seconds for which passes are repeated.
    """
    times: list[list[float]] = [[] for _ in STAGES]
    begin = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - begin < budget:
        for stage, seconds in zip(STAGES, times, strict=True):
            _wait(images.device)
            start = time.perf_counter()
            model(images, stages=stage)
            _wait(images.device)
            seconds.append(time.perf_counter() - start)
    return [min(seconds) for seconds in times]


def trade_off(mean_ious: Sequence[float], times: Sequence[float]) -> list[float | None]:
    """Points of mIoU gained per unit of time added, compared with the stage before (Table 6).

    None for the first stage, and for a stage whose added time is too small to measure.
    """
    result: list[float | None] = [None]
    for (m0, t0), (m1, t1) in itertools.pairwise(zip(mean_ious, times, strict=True)):
        result.append((m1 - m0) / (t1 - t0) if t1 > t0 else None)
    return result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
