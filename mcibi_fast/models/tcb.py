"""TCB (VSPW, CVPR 2021): what a framework gathers within an image, blended over several frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.models.registry import video_method
from mcibi_fast.models.video import Recall, VideoMethod
from mcibi_fast.nn.within_image import PPM, ObjectContext


@video_method(
    "tcb",
    "TCB",
    source="CVPR 2021, VSPW",
    context="means over frames",
    frameworks=("pspnet", "ocrnet"),
)
class TCB(VideoMethod):
    """Temporal context blending: PSPNet's pooled means (st-ppm) or OCRNet's regions (st-ocr).

    They are averaged over the frames of a clip; the current frame's pixels then take them as in
    the image model, whose weights these are. A past frame therefore leaves 50 vectors (st-ppm) or
    K (st-ocr). VSPW tests with future frames; here only the past is seen, in training as well. Its
    auxiliary loss is of all frames; here it is of the current one, as only that has labels.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        history: number of past frames in a clip.
        gap: number of frames from one frame of a clip to the next; the data's must be the same.
        memory_frames: in evaluation, take so many frames before the current one instead, without
            gaps (TCB_st-ocr-mem, with 8); 0 takes those of a clip. VSPW's own list of regions never
            drops the first ones of a video.
        options: those of the framework.
    """

    usual_history = 3
    usual_gap = 3

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        history: int = usual_history,
        gap: int = usual_gap,
        memory_frames: int = 0,
        **options: Any,
    ) -> None:
        for name, value, least in (("gap", gap, 1), ("memory_frames", memory_frames, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        super().__init__(num_classes, in_channels, **options)
        if not isinstance(self._context, (PPM, ObjectContext)):
            raise ValueError("within_image: TCB blends the framework's own context, not another")
        self.history, self.gap, self.memory_frames = history, gap, memory_frames

    @property
    def _context(self) -> Any:
        return self.decoder.conv if self.within_image is None else self.within_image

    @property
    def offsets(self) -> Sequence[int]:
        if self.memory_frames and not self.training:
            return range(self.memory_frames, 0, -1)
        return range(self.gap * self.history, 0, -self.gap)

    def forward(  # type: ignore[override]
        self,
        features: Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        recall: Recall | None = None,
    ) -> SegmentationOutput:
        """Classifies the current frames.

        Args:
            features: the backbone's maps of all frames of B clips, ordered by frame, the earliest
                first; with ``recall`` only of the current frames.
            labels: (B, H, W), of the current frames.
            recall: provides what the past frames left (streaming).
        """
        batch = len(features[-1]) // (1 if recall else len(self.offsets) + 1)
        blend = self._pyramid if isinstance(self._context, PPM) else self._regions
        left, R, first = self._run(blend, features)
        past = recall(left) if recall else left[:-batch].chunk(len(self.offsets))
        mean = torch.stack([*past, left[-batch:]]).mean(dim=0)
        logits = self._run(self._classified, R[-batch:], mean)
        last = [m[-batch:] for m in features]
        first = None if first is None else first[-batch:]
        losses = {} if labels is None else self.losses(last, logits, first, labels)
        return SegmentationOutput(logits, losses)

    def _pyramid(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, None]:
        """The means of all regions of all scales (B, C, 50), and the map that they are means of."""
        pooled = self._context.pool(features[-1])
        return torch.cat([means.flatten(2) for means in pooled], dim=2), features[-1], None

    def _regions(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The regions (B, K, Z), R, and the coarse logits that weigh the regions' pixels."""
        R = self.bottleneck(features[-1])
        coarse = self._first_prediction(features, R)
        return self._context.regions(R, coarse), R, coarse

    def _classified(self, R: Tensor, mean: Tensor) -> Tensor:
        context = self._context
        if not isinstance(context, PPM):
            return self.decoder(context.gather(R, mean))
        sides = [pool.output_size for pool, *_ in context.branches]
        parts = mean.split([side * side for side in sides], dim=2)
        pooled = [part.unflatten(2, (s, s)) for part, s in zip(parts, sides, strict=True)]
        return self.decoder.classify(context.bottleneck(context.concatenated(R, pooled)))
