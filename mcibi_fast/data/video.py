"""Videos: datasets that know the order of their frames, clips for training, streams for inference.

A `VideoDataset` is also a dataset of images in which each labelled frame is a sample, so that image
models can be trained and evaluated on it. `ClipDataset` adds the past frames. `stream` yields the
frames of one video in order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal, TypedDict, TypeGuard

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mcibi_fast.data.base import Sample, SegmentationDataset, Transform
from mcibi_fast.data.errors import DataError

_FRAME_DRAW = 1  # keeps the choice of frames apart from the augmentation's draws


class Frame(TypedDict):
    """One frame: ``image`` (3, H, W) float32, ``label`` (H, W) integer or None, ``name``."""

    image: Tensor
    label: Tensor | None
    name: str


class Clip(Sample):
    """A `Sample` with ``past`` (h, 3, H, W) float32: the frames before N, the latest first."""

    past: Tensor


class VideoDataset(SegmentationDataset):
    """Base class: subclasses give `videos`, `frames`, `frame_name` and `read_frame`.

    Videos and frames are numbered from 0. ``dataset[i]`` is labelled frame ``i`` of all videos, in
    order; ``dataset.frame(video, frame)`` is any frame. The frames of a video have one size.
    """

    def videos(self) -> list[str]:
        """The names of the videos."""
        raise NotImplementedError

    def frames(self, video: int) -> int:
        """The number of frames of a video, labelled or not."""
        raise NotImplementedError

    def frame_name(self, video: int, frame: int) -> str:
        """The frame's name, unique within the dataset."""
        raise NotImplementedError

    def read_frame(
        self, video: int, frame: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.integer] | None]:
        """A frame without any transform: image (H, W, 3) uint8, label (H, W) or None.

        Raises DataError.
        """
        raise NotImplementedError

    def labelled(self, video: int) -> Sequence[int]:
        """The frames of a video that have labels, ascending; here all of them."""
        return range(self.frames(video))

    def frame(self, video: int, frame: int) -> Frame:
        """Frame ``frame`` of video ``video`` under the dataset's transform, which must be one for
        evaluation. Raises IndexError for numbers out of range, DataError for a bad file.
        """
        self._check(video, frame)
        pixels, mask = self.read_frame(video, frame)
        nothing = np.full(pixels.shape[:2], self.ignore_index, np.uint8)
        image, label = self.transformed(pixels, nothing if mask is None else mask, frame)
        return {
            "image": image,
            "label": None if mask is None else label,
            "name": self.frame_name(video, frame),
        }

    def stream(self, video: int, start: int = 0) -> Iterator[Frame]:
        """The frames of a video in order, from ``start``; each is read when it is asked for."""
        self._check(video, start)
        for frame in range(start, self.frames(video)):
            yield self.frame(video, frame)

    def past(self, video: int, frame: int, history: int, gap: int = 1) -> list[int]:
        """The frames N-gap, ..., N-h gap before ``frame``; frame 0 replaces those before the video.

        Raises IndexError for numbers out of range.
        """
        self._check(video, frame)
        return [max(frame - i * gap, 0) for i in range(1, history + 1)]

    def locate(self, index: int) -> tuple[int, int]:
        """Sample ``index`` -> (video, frame)."""
        video = bisect_right(self._starts, index) - 1
        return video, self.labelled(video)[index - self._starts[video]]

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, index: int) -> str:
        return self.frame_name(*self.locate(index))

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """Sample ``index``: image (H, W, 3) uint8, label (H, W). Raises DataError."""
        return self.read_labelled(*self.locate(index))

    def read_labelled(
        self, video: int, frame: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """Like `read_frame`, for a frame that has a label. Raises DataError for one without."""
        pixels, mask = self.read_frame(video, frame)
        if mask is None:
            raise DataError(f"{self.frame_name(video, frame)}: has no label")
        return pixels, mask

    @cached_property
    def _starts(self) -> list[int]:
        """The first sample of each video, and the number of samples."""
        counts = [len(self.labelled(video)) for video in range(len(self.videos()))]
        return [0, *np.cumsum(counts, dtype=int).tolist()]

    def _check(self, video: int, frame: int) -> None:
        if not 0 <= video < len(self.videos()):
            raise IndexError(f"video {video} of a dataset with {len(self.videos())} videos")
        if not 0 <= frame < self.frames(video):
            raise IndexError(f"frame {frame} of a video with {self.frames(video)} frames")


class ClipDataset(SegmentationDataset):
    """Labelled frames with the frames before them, for training and clip-wise evaluation.

    Args:
        source: the videos; its own transform is not used.
        history: h, the number of past frames (Section 3.6); 0 gives ``past`` of shape (0, 3, H, W).
        gap: number of frames from one of these frames to the next.
        frames: "all": every labelled frame is a sample; "one": every video is, by one of its
            labelled frames, which is drawn from (seed, epoch, video) (VSPW's protocol).
        seed: seed of that draw, non-negative.
        transform: transforms the whole clip with one draw; see `TrainTransform`.

    Samples are a `Clip` each: the frame, its label and name, and ``past``. At a video's beginning
    its first frame is repeated. Raises ValueError for a negative history or seed and for a gap
    below 1, and DataError when a sample is read for bad files and for frames that differ in size.
    """

    def __init__(
        self,
        source: VideoDataset,
        *,
        history: int = 2,
        gap: int = 1,
        frames: Literal["all", "one"] = "all",
        seed: int = 0,
        transform: Transform | None = None,
    ) -> None:
        super().__init__(transform)
        if history < 0:
            raise ValueError(f"history: {history} is negative")
        if gap < 1:
            raise ValueError(f"gap: expected at least 1, got {gap}")
        if seed < 0:
            raise ValueError(f"seed: {seed} is negative")
        if frames not in ("all", "one"):
            raise ValueError(f"frames: expected 'all' or 'one', got {frames!r}")
        self.source, self.frames, self.seed = source, frames, seed
        self.history, self.gap = history, gap
        self.classes, self.palette = source.classes, source.palette
        self.mean, self.std = source.mean, source.std
        self.ignore_index, self.flip_pairs = source.ignore_index, source.flip_pairs
        self._labelled = [v for v in range(len(source.videos())) if len(source.labelled(v))]

    def __len__(self) -> int:
        return len(self._labelled) if self.frames == "one" else len(self.source)

    def locate(self, index: int) -> tuple[int, int]:
        """Sample ``index`` -> (video, frame); with ``frames="one"`` in this epoch."""
        if self.frames == "all":
            return self.source.locate(index)
        video = self._labelled[index]
        labelled = self.source.labelled(video)
        rng = np.random.default_rng((self.seed, self.epoch, index, _FRAME_DRAW))
        return video, labelled[int(rng.integers(len(labelled)))]

    def name(self, index: int) -> str:
        return self.source.frame_name(*self.locate(index))

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """Sample ``index`` without its past: image (H, W, 3) uint8, label (H, W)."""
        return self.source.read_labelled(*self.locate(index))

    def read_clip(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """Sample ``index``: frames N, N-gap, ..., N-h gap (1 + h, H, W, 3) uint8, label (H, W)."""
        video, last = self.locate(index)
        wanted = [last, *self.source.past(video, last, self.history, self.gap)]
        pixels, mask = self.source.read_labelled(video, last)
        read = {last: pixels}
        for frame in wanted:
            if frame not in read:
                read[frame] = self.source.read_frame(video, frame)[0]
        for frame, other in read.items():
            if other.shape != pixels.shape:
                raise DataError(
                    f"{self.source.frame_name(video, frame)}: size {other.shape[1]}x"
                    f"{other.shape[0]}, but {self.source.frame_name(video, last)} has "
                    f"{pixels.shape[1]}x{pixels.shape[0]}; the frames of a video have one size"
                )
        return np.stack([read[frame] for frame in wanted]), mask

    def __getitem__(self, index: int) -> Clip:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a dataset with {len(self)} samples")
        index %= len(self)
        images, label = self.transformed(*self.read_clip(index), index)
        return {"image": images[0], "label": label, "name": self.name(index), "past": images[1:]}


def source_of(dataset: VideoDataset | ClipDataset) -> VideoDataset:
    """The videos themselves."""
    return dataset.source if isinstance(dataset, ClipDataset) else dataset


def whole_videos(dataset: SegmentationDataset) -> TypeGuard[VideoDataset | ClipDataset]:
    """Whether its samples are all labelled frames of videos."""
    return isinstance(dataset, VideoDataset) or (
        isinstance(dataset, ClipDataset) and dataset.frames == "all"
    )
