"""Metrics of video segmentation: temporal consistency (TC) and video consistency (VC).

There are two protocols, which are never mixed: "vspw2021" is VSPW's evaluation code with its
quirks, which published figures follow; "strict" follows the definitions. Videos are passed in frame
by frame, and what is kept does not grow with their length.

======  ==================================================  =====================================
        vspw2021                                            strict
======  ==================================================  =====================================
TC      the warp shifts by up to half a pixel (`flow`);     the warp samples where the flow points;
        mean over the classes of the earlier predictions    mean over classes with a union
VC_n    the last window of a video is left out;             the last window counts; unlabelled
        unlabelled pixels count as one more class; a        pixels do not; the constant prediction
        constant prediction counts, right or wrong          must be the right one
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
    """TC: ``score`` in 0..1 (NaN without a pair), number of pairs of frames, name of the flow."""

    score: float
    pairs: int
    flow: str
    protocol: str


@dataclass(frozen=True)
class ConsistencyScore:
    """VC_n: ``score`` in 0..1 (NaN without a window), n (``window``) and the numbers of windows.

    ``windows`` were counted; ``empty`` ones were skipped because no pixel's ground truth is
    constant.
    """

    score: float
    window: int
    windows: int
    empty: int
    protocol: str


class TemporalConsistency:
    """TC: how well the prediction at t agrees with that at t + 1, warped back by optical flow.

    The warped prediction (nearest neighbour, class 0 from outside the image) is compared with the
    earlier one over all pixels, without an occlusion mask, for all pairs of adjacent frames. TC is
    one mIoU over all videos.

    Args:
        num_classes: K.
        flow: estimates the flow from two frames; None if the flow is given with each frame.
        protocol: "vspw2021" or "strict", see the module's documentation.
        max_videos: only videos with a lower number count (VSPW's first 100); None counts all.

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
        """The name of the flow."""
        return GIVEN_FLOW if self.flow is None else self.flow.name

    def check_ranks(self, group: Group = None) -> None:
        """Raises ValueError if the ranks of a distributed run use different flows."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = group if isinstance(group, torch.distributed.ProcessGroup) else None
            names = [""] * torch.distributed.get_world_size(ranks)
            torch.distributed.all_gather_object(names, self.flow_name, group=ranks)
            if len(set(names)) > 1:
                raise ValueError(
                    f"flow: processes differ ({', '.join(sorted(set(names)))}); choose one for all"
                )

    def start(self, video: int) -> None:
        """Begins a new video; ``video`` is its number in the split, counted over all ranks."""
        self._counts = self.max_videos is None or video < self.max_videos
        self._last = None

    def update(
        self, prediction: Tensor, *, image: Tensor | None = None, flow: Tensor | None = None
    ) -> None:
        """Adds the video's next frame.

        Args:
            prediction: (H, W) class indices.
            image: (3, H, W) uint8, the frame; needed if the flow is estimated.
            flow: (2, H, W), the flow from the frame before to this one; needed if the flow is given
                (except at the first frame).

        Raises:
            ValueError: the image or the flow is missing, shapes differ, or a class is out of range.
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
        """The sum over ranks, which must have processed different videos, as a new object."""
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
        """The score of everything counted so far."""
        scores = self.confusion.compute()
        published = self.protocol == "vspw2021"
        return TemporalScore(
            scores.mean_iou_present if published else scores.mean_iou,
            self.pairs,
            self.flow_name,
            self.protocol,
        )


class VideoConsistency:
    """VC_n: among pixels whose ground truth is constant over n frames, the share whose prediction
    is constant, too; the mean over all windows of n frames in all videos.

    A window in which no pixel's ground truth is constant is skipped, and skipped windows are
    counted. In a video of L frames, vspw2021 takes the windows that begin at 0..L-n-1, strict also
    the last one; a video shorter than n gives no window.

    Args:
        window: n, at least 1.
        protocol: "vspw2021" or "strict", see the module's documentation.
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
        self._totals = torch.zeros(3, dtype=torch.float64)  # sum of ratios, windows, empty windows
        self._last: tuple[Tensor, Tensor] | None = None  # prediction and label
        self._steady: tuple[Tensor, Tensor] | None = None  # for how many frames both are constant
        self._pending: Tensor | None = None  # the newest window, which may be the video's last
        self._frames = 0

    def start(self) -> None:
        """Begins a new video."""
        self._totals = self._ended()
        self._last = self._steady = self._pending = None
        self._frames = 0

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Adds the video's next frame: two maps (H, W) of class indices. Does not wait for a GPU.

        Raises:
            ValueError: the two shapes differ, or differ from those of the last frame.
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
            # For how many frames each pixel has had its present class.
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
        """The sum over ranks, which must have processed different videos, as a new object."""
        total = VideoConsistency(
            self.window, protocol=self.protocol, ignore_index=self.ignore_index
        )
        total._totals = _sum_over_ranks(self._ended(), group)
        return total

    def compute(self) -> ConsistencyScore:
        """The score of everything counted so far."""
        total, windows, empty = self._ended().tolist()
        score = total / windows if windows else math.nan
        return ConsistencyScore(score, self.window, int(windows), int(empty), self.protocol)

    def _score(self, steady: tuple[Tensor, Tensor], prediction: Tensor, label: Tensor) -> Tensor:
        """What the window that ends at this frame adds to the totals."""
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
    """A copy, summed over the ranks of a distributed run; see `ConfusionMatrix.reduce`."""
    totals = totals.clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = group if isinstance(group, torch.distributed.ProcessGroup) else None
        device = getattr(group, "device", None)
        if ranks is None and device is not None:
            totals = totals.to(device)
        torch.distributed.all_reduce(totals, group=ranks)
    return totals
