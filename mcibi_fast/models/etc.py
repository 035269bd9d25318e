"""ETC (arXiv 2002.11433): an image model trained to predict consistently along the motion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mcibi_fast.models.flow import FlowName, Frames
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.models.registry import video_method
from mcibi_fast.models.video import VideoMethod
from mcibi_fast.nn.warp import warp


@video_method("etc", "ETC", source="arXiv 2002.11433", context="consistency loss", memories=True)
class ETC(VideoMethod):
    """The temporal consistency loss of ETC on any framework.

    Training takes pairs of frames, of which the second has labels. The head classifies both;
    ``loss_consistency`` is the mean over pixels and classes of

        m^2 (P_t - warp(P_{t-1}))^2,   m = exp(-|sum over colours of (I_t - warp(I_{t-1}))|),

    where P are the logits at the images' size, I the normalised images, and warping moves frame
    t - 1 along the optical flow; m is small where the flow is wrong or something was hidden.
    Gradients go through both frames. All other losses, and the update of a memory, are those of the
    framework on the second frame. In evaluation each frame is taken by itself.

    This is the part of the method that VSPW's baselines have, with their weight and their m;
    distilling a large network into a small one is left out.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        history: 1, the frame before.
        flow: how the flow is estimated: "dis" or "raft", see :meth:`Frames.flow_to`; the baselines
            use RAFT.
        consistency_weight: weight of the consistency loss.
        options: those of the framework.
    """

    takes_frames = True

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        history: int = 1,
        flow: FlowName = "dis",
        consistency_weight: float = 0.1,
        **options: Any,
    ) -> None:
        if history != 1:
            raise ValueError(f"history: ETC is trained on pairs of frames, 1, got {history}")
        super().__init__(num_classes, in_channels, **options)
        self.history, self.flow, self.consistency_weight = history, flow, consistency_weight

    @property
    def offsets(self) -> Sequence[int]:
        return (1,) if self.training else ()

    def forward(
        self,
        features: Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        frames: Frames | None = None,
        **options: Any,
    ) -> SegmentationOutput:
        """Classifies the last frames.

        Args:
            features: the backbone's maps; while training of the frames t - 1, then of the frames t.
            labels: (B, H, W), of the frames t.
            frames: the frames of the maps; needed for training.
            options: options of the framework's ``forward``.
        """
        if not self.training or frames is None:
            return super().forward(features, labels, **options)
        before = super().forward([m[: len(m) // 2] for m in features], **options).logits
        output = super().forward([m[len(m) // 2 :] for m in features], labels, **options)
        if labels is not None:
            loss = self.inconsistency(output.logits, before, frames)
            output.losses["loss_consistency"] = self.consistency_weight * loss
        return output

    def inconsistency(self, logits: Tensor, before: Tensor, frames: Frames) -> Tensor:
        """The mean of m^2 (P_t - warp(P_{t-1}))^2, from logits of any size (B, K, h, w)."""
        images = frames.images
        previous, current = images.chunk(2)
        flow = Frames(current, frames.normalisation).flow_to(previous, self.flow)
        m = (-(current - warp(previous, flow)).sum(dim=1, keepdim=True).abs()).exp()
        now, then = (self.upsample(each, images.shape[2:]) for each in (logits, before))
        return (m * (now - warp(then, flow))).float().square().mean()
