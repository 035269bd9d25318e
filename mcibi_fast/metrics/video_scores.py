"""All scores of video segmentation in one pass over the frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.metrics.confusion import ConfusionMatrix, SegmentationMetrics
from mcibi_fast.metrics.flow import FlowFunction
from mcibi_fast.metrics.temporal import (
    TC_VIDEOS,
    ConsistencyScore,
    TemporalConsistency,
    TemporalScore,
    VideoConsistency,
)
from mcibi_fast.protocols import check_protocol

if TYPE_CHECKING:
    from mcibi_fast.metrics.temporal import Group


@dataclass(frozen=True)
class VideoScores:
    """All scores of a split: scores of single frames, TC (None if not asked for) and each VC_n."""

    frames: SegmentationMetrics
    tc: TemporalScore | None
    vc: tuple[ConsistencyScore, ...]
    protocol: str

    @property
    def mean_iou(self) -> float:
        """mIoU by the protocol's convention: over classes with ground truth, or with a union."""
        published = self.protocol == "vspw2021"
        return self.frames.mean_iou_present if published else self.frames.mean_iou

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers (None for NaN) and names, ready for JSON."""
        scores: dict[str, Any] = {
            "protocol": self.protocol,
            "pixel_accuracy": self.frames.pixel_accuracy,
            "mean_class_accuracy": self.frames.mean_class_accuracy,
            "mean_iou": self.mean_iou,
        }
        if self.tc is not None:
            scores |= {"tc": self.tc.score, "tc_pairs": self.tc.pairs, "tc_flow": self.tc.flow}
        for vc in self.vc:
            name = f"vc{vc.window}"
            scores |= {name: vc.score, f"{name}_windows": vc.windows, f"{name}_empty": vc.empty}
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in scores.items()
        }

    def table(self) -> str:
        """A text table in percent, with the protocol, the flow and the numbers of windows."""
        lines = [f"protocol {self.protocol}"]
        rows = [
            ("pixel accuracy", self.frames.pixel_accuracy, ""),
            ("mean class accuracy", self.frames.mean_class_accuracy, ""),
            ("mIoU", self.mean_iou, ""),
        ]
        if self.tc is not None:
            rows.append(("TC", self.tc.score, f"{self.tc.pairs} pairs, flow: {self.tc.flow}"))
        for vc in self.vc:
            empty = f", {vc.empty} empty ones skipped" if vc.empty else ""
            rows.append((f"VC{vc.window}", vc.score, f"{vc.windows} windows{empty}"))
        for name, value, note in rows:
            number = "     -" if math.isnan(value) else f"{100 * value:6.2f}"
            lines.append(f"{name:<19} {number}  {note}".rstrip())
        return "\n".join(lines)


class VideoMetrics:
    """All scores of Table 17 in one pass over the frames: accuracies, mIoU, TC and VC_n.

    Args:
        num_classes: K.
        protocol: "vspw2021" or "strict", for all scores.
        windows: the number n for each VC_n.
        flow: a function that estimates the flow for TC, or "given"; None leaves TC out.
        max_videos: see `TemporalConsistency`.
        ignore_index: label of unlabelled pixels.

    Call `start` for each video, `update` for each of its frames, and `reduce` at the end of a
    distributed run, in which each video must have been processed, as a whole, by one rank.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        protocol: str = "vspw2021",
        windows: Sequence[int] = (8, 16),
        flow: FlowFunction | Literal["given"] | None = None,
        max_videos: int | None = TC_VIDEOS,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        check_protocol(protocol)
        self.protocol = protocol
        self.confusion = ConfusionMatrix(num_classes, ignore_index)
        self.tc: TemporalConsistency | None = None
        if flow is not None:
            self.tc = TemporalConsistency(
                num_classes,
                None if isinstance(flow, str) else flow,
                protocol=protocol,
                max_videos=max_videos,
            )
        self.vc = [
            VideoConsistency(n, protocol=protocol, ignore_index=ignore_index) for n in windows
        ]

    def start(self, video: int) -> None:
        """Begins a new video; ``video`` is its number in the split, counted over all ranks."""
        if self.tc is not None:
            self.tc.start(video)
        for vc in self.vc:
            vc.start()

    def update(
        self,
        prediction: Tensor,
        label: Tensor | None,
        *,
        image: Tensor | None = None,
        flow: Tensor | None = None,
    ) -> None:
        """Adds the video's next frame.

        Args:
            prediction: (H, W) class indices.
            label: (H, W), or None for a frame without a label: it counts for TC only, and no window
                of VC_n extends across it.
            image, flow: see `TemporalConsistency.update`.
        """
        if self.tc is not None:
            self.tc.update(prediction, image=image, flow=flow)
        if label is not None:
            self.confusion.update(prediction, label)
        for vc in self.vc:
            if label is None:
                vc.start()
            else:
                vc.update(prediction, label)

    def reduce(self, group: Group = None) -> VideoMetrics:
        """The sum over ranks as a new object; see `ConfusionMatrix.reduce`."""
        total = VideoMetrics(
            self.confusion.num_classes,
            protocol=self.protocol,
            windows=(),
            ignore_index=self.confusion.ignore_index,
        )
        total.confusion = self.confusion.reduce(group)
        total.tc = None if self.tc is None else self.tc.reduce(group)
        total.vc = [vc.reduce(group) for vc in self.vc]
        return total

    def compute(self) -> VideoScores:
        """The scores of everything counted so far."""
        return VideoScores(
            self.confusion.compute(),
            None if self.tc is None else self.tc.compute(),
            tuple(vc.compute() for vc in self.vc),
            self.protocol,
        )
