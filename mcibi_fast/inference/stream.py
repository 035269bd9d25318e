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

    For a video model (folded or not), what the past frames left that it still needs (for
    Video-MCIBI++ the contexts of the last h) is kept in rings, which are allocated at the first
    frame and overwritten from then on: the memory used does not grow with the video. Up to
    rounding, the result is that of the model on the clip of these frames and the current one; at
    the beginning of a video the first frame's context replaces the missing ones. An image model
    treats each frame separately.

    Args:
        model: a model in evaluation mode.
        stages: number of stages of iterative inference; by default the model's.

    Call ``reset`` when another video begins. Several videos with frames of the same size may run
    together as a batch.
    """

    def __init__(self, model: Segmentor, *, stages: int | None = None) -> None:
        self.model: Any = model
        self._options: dict[str, Any] = {} if stages is None else {"stages": stages}
        self._rings: tuple[Tensor, ...] = ()  # (frames, B, ...), one for each tensor that is kept
        self._oldest = 0
        self._size: torch.Size | None = None

    def reset(self) -> None:
        """Begins a new video; its frames may have another size."""
        self._rings, self._size = (), None
        self._oldest = 0

    @property
    def nbytes(self) -> int:
        """Bytes kept between frames; 0 before the first frame, and for an image model."""
        return sum(ring.nbytes for ring in self._rings)

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
        if not isinstance(self.model, VideoSegmentor) or not self.model.reach:
            return self.model(frames, **self._options)
        if self._size is not None and frames.shape != self._size:
            raise ValueError(
                f"frames: expected {tuple(self._size)} as before, got {tuple(frames.shape)}; call "
                "reset() when another video begins"
            )
        kept: list[tuple[Tensor, ...]] = []

        def recall(left: Tensor | tuple[Tensor, ...]) -> list[Any]:
            kept.append(left if isinstance(left, tuple) else (left,))
            return self._past(left)

        output = self.model.step(frames, recall, **self._options)
        self._keep(kept[0])  # the model has read the slot that this overwrites
        self._size = frames.shape
        return output

    def _past(self, left: Tensor | tuple[Tensor, ...]) -> list[Any]:
        """What the past frames left, the earliest first; at the first frame its own, repeated."""
        offsets = self.model.head.offsets
        if not self._rings:
            return [left] * len(offsets)
        places = [(self._oldest - offset) % self.model.reach for offset in offsets]
        if not isinstance(left, tuple):
            return [self._rings[0][place] for place in places]
        return [tuple(ring[place] for ring in self._rings) for place in places]

    def _keep(self, left: tuple[Tensor, ...]) -> None:
        reach = self.model.reach
        if not self._rings:
            self._rings = tuple(torch.stack([each] * reach) for each in left)
            return
        for ring, each in zip(self._rings, left, strict=True):
            ring[self._oldest].copy_(each)
        self._oldest = (self._oldest + 1) % reach


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

    def __call__(
        self, images: Tensor, *, stages: int | None = None, previous_logits: Tensor | None = None
    ) -> SegmentationOutput:
        """The next view or window of the frame; with ``previous_logits`` its next stage, by the
        released protocol, which only image models can follow.
        """
        if previous_logits is not None:
            return self.model(images, stages=stages, previous_logits=previous_logits)
        if self._used == len(self._streams):
            self._streams.append(VideoStream(self.model, stages=stages))
        self._used += 1
        return self._streams[self._used - 1](images)
