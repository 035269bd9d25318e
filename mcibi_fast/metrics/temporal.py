"""Metrics of video segmentation: temporal consistency (TC) and video consistency (VC).

Two protocols, never mixed: "vspw2021" is VSPW's evaluation code with its quirks, which published
figures follow; "strict" is what the definitions say. Videos are fed frame by frame; what is kept of
one does not grow with its length.

======  ==================================================  =====================================
        vspw2021                                            strict
======  ==================================================  =====================================
TC      the warp shifts by up to half a pixel (`flow`);     the warp samples where the flow points;
        mean over the classes of the earlier predictions    mean over classes with a union
VC_n    the last window of a video is missed; unlabelled    the last window counts; unlabelled
        pixels count as a class of their own; a constant    pixels do not; the constant prediction
        prediction counts, right or wrong                   must be the right one
======  ==================================================  =====================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed
from torch import Tensor

from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.metrics.confusion import ConfusionMatrix
from mcibi_fast.metrics.flow import FlowFunction, warp_backward
from mcibi_fast.protocols import check_protocol

if TYPE_CHECKING:
    from accelerate import Accelerator

    Group: TypeAlias = Accelerator | torch.distributed.ProcessGroup | None

GIVEN_FLOW = "exact (given with the frames)"
TC_VIDEOS = 100


@dataclass(frozen=True)
class TemporalScore:
    """TC: ``score`` in 0..1 (NaN without a pair), the pairs of frames counted, by which flow."""

    score: float
    pairs: int
    flow: str
    protocol: str


@dataclass(frozen=True)
class ConsistencyScore:
    """VC_n: ``score`` in 0..1 (NaN without a window), n, windows counted, and windows skipped
    because no pixel's ground truth is constant (``empty``).
    """

    score: float
    window: int
    windows: int
    empty: int
    protocol: str


class TemporalConsistency:
    """TC: how well the prediction at t agrees with that at t + 1, warped back by optical flow.

    The warped prediction (nearest, class 0 from outside) is scored against the earlier one over all
    pixels, without an occlusion mask, for all adjacent pairs; one mIoU of all videos.

    Args:
        num_classes: K.
        flow: estimates the flow from two frames; None: it is given with each frame.
        protocol: "vspw2021" or "strict", see the module.
        max_videos: only videos numbered below it count (VSPW's first 100); None counts all.

    Call `start` for each video and `update` for each of its frames.
    """

    def __init__(
        self,
        num_classes: int,
        flow: FlowFunction | None = None,
        *,
        protocol: str = "vspw2021",
        max_videos: int | None = TC_VIDEOS,
    ) -> None:
        check_protocol(protocol)
        self.flow, self.protocol, self.max_videos = flow, protocol, max_videos
        # No label is ignored: rows are earlier predictions, columns later ones.
        self.confusion = ConfusionMatrix(num_classes, ignore_index=-1)
        self.pairs = 0
        self._counts = False
        self._last: tuple[Tensor, Tensor | None] | None = None

    @property
    def flow_name(self) -> str:
        """Which flow it is."""
        return GIVEN_FLOW if self.flow is None else self.flow.name

    def check_ranks(self, group: Group = None) -> None:
        """Raises ValueError where the ranks of a distributed run have different flows."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = group if isinstance(group, torch.distributed.ProcessGroup) else None
            names = [""] * torch.distributed.get_world_size(ranks)
            torch.distributed.all_gather_object(names, self.flow_name, group=ranks)
            if len(set(names)) > 1:
                raise ValueError(
                    f"flow: processes differ ({', '.join(sorted(set(names)))}); choose one for all"
                )

    def start(self, video: int) -> None:
        """A new video; ``video`` is its number in the split, on whatever rank."""
        self._counts = self.max_videos is None or video < self.max_videos
        self._last = None

    def update(
        self, prediction: Tensor, *, image: Tensor | None = None, flow: Tensor | None = None
    ) -> None:
        """Adds the video's next frame.

        Args:
            prediction: (H, W) class indices.
            image: (3, H, W) uint8, the frame; for a flow that is estimated.
            flow: (2, H, W), from the frame before to this one; for a flow that is given (nothing
                at the first frame).

        Raises:
            ValueError: what is missing, shapes that differ, a class out of range.
        """
        if not self._counts:
            return
        if self.flow is not None and image is None:
            raise ValueError(f"image: {self.flow.name} needs the frames")
        last, self._last = self._last, (prediction, image)
        if last is None:
            return
        earlier, previous = last
        if self.flow is not None:
            assert previous is not None and image is not None
            flow = self.flow(previous, image)
        elif flow is None:
            raise ValueError("flow: none is given, and the metric has no function to estimate it")
        warped = warp_backward(prediction, flow, self.protocol)
        self.confusion.update(warped, earlier)
        self.pairs += 1

    def reduce(self, group: Group = None) -> TemporalConsistency:
        """The sum over ranks, which have had different videos, as a new object."""
        total = TemporalConsistency(
            self.confusion.num_classes,
            self.flow,
            protocol=self.protocol,
            max_videos=self.max_videos,
        )
        total.confusion = self.confusion.reduce(group)
        total.pairs = int(_sum_over_ranks(torch.tensor([self.pairs]), group)[0])
        return total

    def compute(self) -> TemporalScore:
        """The score of what was counted so far."""
        scores = self.confusion.compute()
        published = self.protocol == "vspw2021"
        return TemporalScore(
            scores.mean_iou_present if published else scores.mean_iou,
            self.pairs,
            self.flow_name,
            self.protocol,
        )


class VideoConsistency:
    """VC_n: of the pixels whose ground truth is constant over n frames, the share whose prediction
    is, too; the mean over all windows of n frames of all videos.

    A window in which no pixel's ground truth is constant is skipped and counted. vspw2021 takes the
    windows that begin at 0..L-n-1 of a video of L frames, strict also the last; neither takes any
    of a shorter video.

    Args:
        window: n, at least 1.
        protocol: "vspw2021" or "strict", see the module.
        ignore_index: label of unlabelled pixels.

    Call `start` for each video and `update` for each of its frames; `compute` and `reduce` end the
    last video.
    """

    def __init__(
        self, window: int, *, protocol: str = "vspw2021", ignore_index: int = IGNORE_INDEX
    ) -> None:
        check_protocol(protocol)
        if window < 1:
            raise ValueError(f"window: {window} frames, expected at least 1")
        self.window, self.protocol, self.ignore_index = window, protocol, ignore_index
        self._totals = torch.zeros(3, dtype=torch.float64)  # of ratios, of windows, of empty ones
        self._last: tuple[Tensor, Tensor] | None = None  # prediction and label
        self._steady: tuple[Tensor, Tensor] | None = None  # for how many frames, of the two
        self._pending: Tensor | None = None  # the newest window, which may be the video's last
        self._frames = 0

    def start(self) -> None:
        """A new video."""
        self._totals = self._ended()
        self._last = self._steady = self._pending = None
        self._frames = 0

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Adds the video's next frame: (H, W) class indices each. Nothing waits for the device.

        Raises:
            ValueError: shapes that differ, from each other or from the last frame's.
        """
        expected = label.shape if self._last is None else self._last[1].shape
        for name, tensor in (("prediction", prediction), ("label", label)):
            if tensor.shape != expected:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(expected)}")
        label = label.to(prediction.device)
        one = torch.ones_like(label, dtype=torch.int64)
        if self._last is None or self._steady is None:
            self._steady = one, one
        else:
            # For how many frames a pixel has been what it is now.
            self._steady = (
                torch.where(prediction == self._last[0], self._steady[0] + 1, one),
                torch.where(label == self._last[1], self._steady[1] + 1, one),
            )
        self._last, self._frames = (prediction, label), self._frames + 1
        if self._pending is not None:  # the window before is not the video's last
            self._totals = self._totals.to(prediction.device) + self._pending
        if self._frames >= self.window:
            self._pending = self._score(self._steady, prediction, label)

    def reduce(self, group: Group = None) -> VideoConsistency:
        """The sum over ranks, which have had different videos, as a new object."""
        total = VideoConsistency(
            self.window, protocol=self.protocol, ignore_index=self.ignore_index
        )
        total._totals = _sum_over_ranks(self._ended(), group)
        return total

    def compute(self) -> ConsistencyScore:
        """The score of what was counted so far."""
        total, windows, empty = self._ended().tolist()
        score = total / windows if windows else math.nan
        return ConsistencyScore(score, self.window, int(windows), int(empty), self.protocol)

    def _score(self, steady: tuple[Tensor, Tensor], prediction: Tensor, label: Tensor) -> Tensor:
        """What the window that ends here adds to the totals."""
        constant, truth = (frames >= self.window for frames in steady)  # P and G
        if self.protocol == "strict":
            truth = truth & (label != self.ignore_index)
            constant = constant & (prediction == label)
        both, size = (truth & constant).sum().double(), truth.sum().double()
        counts = size > 0
        return torch.stack([both / size.clamp(min=1), counts.double(), (~counts).double()])

    def _ended(self) -> Tensor:
        """The totals if the video ended here: strict counts the last window, vspw2021 does not."""
        if self.protocol == "strict" and self._pending is not None:
            return self._totals.to(self._pending.device) + self._pending
        return self._totals.clone()


def _sum_over_ranks(totals: Tensor, group: Group) -> Tensor:
    """A copy, added up over the ranks of a distributed run; see `ConfusionMatrix.reduce`."""
    totals = totals.clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = group if isinstance(group, torch.distributed.ProcessGroup) else None
        device = getattr(group, "device", None)
        if ranks is None and device is not None:
            totals = totals.to(device)
        torch.distributed.all_reduce(totals, group=ranks)
    return totals
