"""Optical flow between the frames that a video model is given."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mcibi_fast.metrics.flow import DISFlow, FlowFunction, RAFTFlow

FlowName = Literal["dis", "raft"]
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Frames(NamedTuple):
    """Frames as a model gets them, from which flow is estimated.

    Attributes:
        images: (B, 3, H, W), normalised.
        normalisation: their mean and standard deviation; None means ImageNet's.
    """

    images: Tensor
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None

    def flow_to(self, others: Tensor, name: FlowName) -> Tensor:
        """The flow from these frames to other ones, (B, 2, H, W), x and y in pixels.

        It is estimated without gradients, on frames of whole colours from 0 to 255.

        Args:
            others: (B, 3, H, W), normalised in the same way.
            name: "dis" (:class:`mcibi_fast.metrics.DISFlow`, which works on the CPU, so that each
                call waits for the device) or "raft" (:class:`mcibi_fast.metrics.RAFTFlow` with the
                weights that torchvision finds, for frames of at least 128 x 128).

        Raises:
            ValueError: OpenCV or torchvision is missing, or the frames are too small for RAFT.
            OSError: RAFT's weights are missing.
        """
        if self.images.device.type == "meta":
            return self.images.new_zeros(len(others), 2, *others.shape[2:])
        return _estimate(self._colours(self.images), self._colours(others), name).to(others.dtype)

    def _colours(self, images: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(numbers, dtype=torch.float32, device=images.device).view(3, 1, 1)
            for numbers in self.normalisation or _IMAGENET
        )
        return ((images.detach().float() * std + mean) * 255).round().clamp(0, 255).byte()


@functools.cache
def estimator(name: FlowName, device: str) -> FlowFunction:
    """The function that estimates the flow; it is no part of any model, nor of its weights."""
    if name == "raft":
        return RAFTFlow(device=device)
    if name == "dis":
        return DISFlow()
    raise ValueError(f"flow: expected 'dis' or 'raft', got {name!r}")


@torch.compiler.disable
@torch.no_grad()
def _estimate(first: Tensor, second: Tensor, name: FlowName) -> Tensor:
    estimate = estimator(name, str(first.device))
    with torch.autocast(first.device.type, enabled=False):
        return torch.stack([estimate(a, b) for a, b in zip(first, second, strict=True)])
