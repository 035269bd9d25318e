"""Processes a video frame by frame: each is computed once, and what later ones need is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mcibi_fast.inference.labels import FlipPairs, check_model, predict_labels
from mcibi_fast.inference.pictures import Picture
from mcibi_fast.inference.precision import autocast, precision_of
from mcibi_fast.models import SegmentationOutput, Segmentor, VideoSegmentor
from mcibi_fast.models.weights import Precision
from mcibi_fast.recipes.config import InferenceConfig


class VideoStream:
    """Feeds the frames of a video to a model in order.

    For a video model (folded or not), the contexts of the last h frames are kept in a ring of h
    maps, which is allocated at the first frame and overwritten from then on: the memory used does
    not grow with the video. Up to rounding, the result is that of the model on the clip of the last
    h + 1 frames; at the beginning of a video the first frame's context replaces the missing ones.
    An image model treats each frame separately.

    Args:
        model: a model in evaluation mode.
        stages: number of stages of iterative inference; by default the model's.

    Call ``reset`` when another video begins. Several videos with frames of the same size may run
    together as a batch.
    """

    def __init__(self, model: Segmentor, *, stages: int | None = None) -> None:
        self.model: Any = model
        self._options = {} if stages is None else {"stages": stages}
        self._ring: Tensor | None = None  # (h, B, c, h', w')
        self._oldest = 0
        self._size: torch.Size | None = None

    def reset(self) -> None:
        """Begins a new video; its frames may have another size."""
        self._ring = self._size = None
        self._oldest = 0

    @property
    def nbytes(self) -> int:
        """Bytes kept between frames; 0 before the first frame, and for an image model."""
        return 0 if self._ring is None else self._ring.nbytes

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> SegmentationOutput:
        """The next frame's logits.

        Args:
            frames: (B, 3, H, W), normalised; B videos' next frames, of the size of the first ones.

        Raises:
            RuntimeError: the model is in training mode.
            ValueError: another shape than before.
        """
        if self.model.training:
            raise RuntimeError("stream: the model is in training mode; call eval() first")
        if not isinstance(self.model, VideoSegmentor):
            return self.model(frames, **self._options)
        if self._size is not None and frames.shape != self._size:
            raise ValueError(
                f"frames: expected {tuple(self._size)} as before, got {tuple(frames.shape)}; call "
                "reset() when another video begins"
            )
        kept: list[Tensor] = []

        def recall(left: Tensor) -> list[Tensor]:
            kept.append(left)
            return self._past(left)

        output = self.model.step(frames, recall, **self._options)
        self._keep(kept[0])  # the model has read the slot that this overwrites
        self._size = frames.shape
        return output

    def _past(self, left: Tensor) -> list[Tensor]:
        """What the past frames left, the earliest first; at the first frame its own, repeated."""
        if self._ring is None:
            return [left] * self.model.history
        h = len(self._ring)
        return [self._ring[(self._oldest + i) % h] for i in range(h)]

    def _keep(self, left: Tensor) -> None:
        if self._ring is None:
            self._ring = torch.stack([left] * self.model.history)
        else:
            self._ring[self._oldest].copy_(left)
            self._oldest = (self._oldest + 1) % len(self._ring)


class VideoPredictor:
    """Predicts class indices for the frames of a video, in order.

    Every view and every window of test-time inference is a separate stream, so that its past frames
    have the same position and scale.

    Args:
        model: an image or video model in evaluation mode; an image model treats each frame
            separately.
        inference: the default is one pass over the whole frame.
        flip_pairs: classes that a mirrored frame swaps.
        precision: by default that of the model's training, see `precision.precision_of`.

    Raises:
        ValueError: settings that make no sense, or that the model cannot follow.
    """

    def __init__(
        self,
        model: Segmentor,
        inference: InferenceConfig | None = None,
        *,
        flip_pairs: FlipPairs = (),
        precision: Precision | None = None,
    ) -> None:
        self.inference = inference or InferenceConfig()
        check_model(model, self.inference)
        self.model, self.head, self.flip_pairs = model, model.head, flip_pairs
        self.needs_labels = model.needs_labels
        self.precision = precision
        self._streams: list[VideoStream] = []
        self._used = 0
        self._shape = torch.Size()

    def reset(self) -> None:
        """Begins another video."""
        self._streams.clear()

    def predict(self, frame: Tensor | Picture, size: tuple[int, int]) -> Tensor:
        """The next frame, (3, H', W') normalised or as a `Picture` -> (H, W) int64, ``size`` being
        (H, W).

        The upsampled logits are not formed. Raises ValueError for a frame of another size.
        """
        shape = frame.shape if isinstance(frame, Tensor) else frame.pixels.shape
        if self._streams and shape != self._shape:
            raise ValueError(
                f"frame: expected {tuple(self._shape)} as before, got {tuple(shape)}; the "
                "frames of a video have one size"
            )
        self._used, self._shape = 0, shape
        views: Any = self  # what calls a model calls the streams one after another
        images = frame[None] if isinstance(frame, Tensor) else frame
        device = next(self.model.parameters()).device
        with autocast(device, precision_of(self.model, device, self.precision)):
            labels = predict_labels(views, images, size, self.inference, flip_pairs=self.flip_pairs)
        return labels[0]

    def __call__(self, images: Tensor, *, stages: int | None = None) -> SegmentationOutput:
        """The next view or window of the frame."""
        if self._used == len(self._streams):
            self._streams.append(VideoStream(self.model, stages=stages))
        self._used += 1
        return self._streams[self._used - 1](images)
