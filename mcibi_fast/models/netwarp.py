"""NetWarp (arXiv 1708.03088): maps of the frame before, warped along the motion and mixed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.models.flow import FlowName, Frames
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.models.registry import video_method
from mcibi_fast.models.video import Recall, VideoMethod
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.warp import warp
from mcibi_fast.nn.within_image import PPM


@video_method(
    "netwarp",
    "NetWarp",
    source="arXiv 1708.03088",
    context="warped maps of a frame",
    frameworks=("pspnet", "ocrnet"),
)
class NetWarp(VideoMethod):
    """Mixes two maps of the frame before into those of the current one.

    The result is w_0 z_t + w_1 warp(z_{t-1}). The weights are learnt, one per channel; they begin
    with 1 and 0. The maps are the last stage and, as in VSPW's baselines, PSPNet's concatenated
    pyramid or OCRNet's context. Those of the frame before are its own: nothing was mixed into
    them. A small network, :class:`FlowCNN`, corrects the optical flow.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        history: 1, the frame before.
        flow: how the flow is estimated: "dis" or "raft", see :meth:`Frames.flow_to`; the baselines
            use RAFT.
        options: those of the framework.
    """

    takes_frames = True
    added_modules = ("flow_cnn", "mix_last", "mix_context")

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        history: int = 1,
        flow: FlowName = "dis",
        **options: Any,
    ) -> None:
        if history != 1:
            raise ValueError(f"history: NetWarp takes the frame before, 1, got {history}")
        super().__init__(num_classes, in_channels, **options)
        self.history, self.flow = history, flow
        conv = self.decoder.conv
        last: Any = conv.bottleneck[0] if isinstance(conv, PPM) else self.decoder.classifier
        self.flow_cnn = FlowCNN()
        self.mix_last, self.mix_context = Mixture(in_channels[-1]), Mixture(last.in_channels)

    @property
    def offsets(self) -> Sequence[int]:
        return (1,)

    def forward(  # type: ignore[override]
        self,
        features: Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        frames: Frames,
        recall: Recall | None = None,
    ) -> SegmentationOutput:
        """Classifies the frames t.

        Args:
            features: the backbone's maps of the frames t - 1, then of the frames t; with ``recall``
                only of the frames t.
            labels: (B, H, W), of the frames t.
            frames: the frames of the maps.
            recall: provides what the frames t - 1 left (streaming).
        """
        batch = len(features[-1]) // (1 if recall else 2)
        last, images = [m[-batch:] for m in features], frames.images
        plain = self._run(self._context, [m[:batch] for m in features])[0]
        left = images[:batch], features[-1][:batch], plain  # of the frames t - 1, without recall
        previous, stage, context = recall(left)[0] if recall else left

        current = Frames(images[-batch:], frames.normalisation)
        flow = current.flow_to(previous, self.flow)
        motion = self._run(self.flow_cnn, flow, current.images, previous)
        mixed = [*last[:-1], self._run(self.mix_last, last[-1], stage, motion)]
        own, first = self._run(self._context, mixed)
        logits = self._run(self._classified, self._run(self.mix_context, own, context, motion))
        losses = {} if labels is None else self.losses(last, logits, first, labels)
        return SegmentationOutput(logits, losses)

    def _context(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The second map that is mixed, and the logits of OCRNet's first prediction."""
        ppm = self.decoder.conv
        if isinstance(ppm, PPM):
            return ppm.concatenated(features[-1], ppm.pool(features[-1])), None
        return self.decoder_input(features)

    def _classified(self, context: Tensor) -> Tensor:
        ppm = self.decoder.conv
        if isinstance(ppm, PPM):
            return self.decoder.classify(ppm.bottleneck(context))
        return self.decoder(context)


class FlowCNN(nn.Module):
    """Corrects the flow: four convolutions, the last one of which sees the flow again.

    The last convolution is linear. In VSPW's baselines batch norm and ReLU follow it, so that no
    component of their flow is negative.

    Shape: flow (B, 2, H, W), frames t and t - 1 (B, 3, H, W) -> (B, 2, H, W).
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            conv_bn_relu(11, 16, 3), conv_bn_relu(16, 32, 3), conv_bn_relu(32, 2, 3)
        )
        self.last = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, flow: Tensor, current: Tensor, previous: Tensor) -> Tensor:
        hidden = self.hidden(torch.cat([flow, current, previous, previous - current], dim=1))
        return self.last(torch.cat([flow, hidden], dim=1))


class Mixture(nn.Module):
    """w_0 z_t + w_1 warp(z_{t-1}) with weights per channel.

    The motion is resized to the maps, and its numbers are scaled to pixels of the maps, which
    VSPW's baselines do not do.

    Args:
        channels: C.

    Shape: maps of t and t - 1 (B, C, h, w), motion (B, 2, H, W) -> (B, C, h, w).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.current = nn.Parameter(torch.ones(channels, 1, 1))
        self.previous = nn.Parameter(torch.zeros(channels, 1, 1))

    def reset_parameters(self) -> None:
        """Sets the weights as after ``__init__``."""
        nn.init.ones_(self.current)
        nn.init.zeros_(self.previous)

    def forward(self, current: Tensor, previous: Tensor, motion: Tensor) -> Tensor:
        (height, width), size = motion.shape[2:], current.shape[2:]
        scale = motion.new_tensor([size[1] / width, size[0] / height]).view(2, 1, 1)
        flow = F.interpolate(motion, size, mode="bilinear") * scale
        return self.current * current + self.previous * warp(previous, flow)
