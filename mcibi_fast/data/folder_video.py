"""Videos in a folder of images: frames are files ``<video>_<number>``, as CamVid's are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.base import Transform
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.folder import FolderDataset, sample_name
from mcibi_fast.data.video import VideoDataset

_STEM = re.compile(r"(.+)_[A-Za-z]*(\d+)")


class FolderVideos(VideoDataset, FolderDataset):
    """A split of a `FolderDataset` as videos; every frame has a label.

    The frames of a video are sorted by their numbers. Where the number jumps by more than twice the
    usual step, the recording was interrupted, and a new video begins: ``<video>.2``, ``<video>.3``.

    CamVid: ``FolderVideos(root, split, classes=CAMVID_CLASSES)`` (train 0001TP, 0006R0 and three
    parts of 0016E5; its labelled frames are 30 apart, in val 2).

    Takes the arguments of `FolderDataset` and raises what it raises, and DataError for a file whose
    name has no number.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Transform | None = None,
        *,
        classes: Sequence[str] | None = None,
        binary: bool = False,
        reduce_labels: bool = False,
    ) -> None:
        FolderDataset.__init__(
            self,
            root,
            split,
            transform,
            classes=classes,
            binary=binary,
            reduce_labels=reduce_labels,
        )
        numbered = sorted(
            (*split_stem(sample_name(image)), image, label) for image, label in self.pairs
        )
        recordings: dict[str, list[tuple[int, tuple[str, str]]]] = {}
        for recording, number, image, label in numbered:
            recordings.setdefault(recording, []).append((number, (image, label)))
        self._videos: dict[str, list[tuple[str, str]]] = {}
        for recording, frames in recordings.items():
            for part, (start, end) in enumerate(pairwise(cuts([number for number, _ in frames]))):
                name = recording if part == 0 else f"{recording}.{part + 1}"
                self._videos[name] = [pair for _, pair in frames[start:end]]
        self._names = list(self._videos)

    def videos(self) -> list[str]:
        return list(self._names)

    def frames(self, video: int) -> int:
        return len(self._videos[self._names[video]])

    def frame_name(self, video: int, frame: int) -> str:
        return sample_name(self._videos[self._names[video]][frame][0])

    def read_frame(
        self, video: int, frame: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.integer] | None]:
        return self.read_pair(self._videos[self._names[video]][frame])


def split_stem(stem: str) -> tuple[str, int]:
    """ "0016E5_07959" -> ("0016E5", 7959). Raises DataError when there is no number."""
    match = _STEM.fullmatch(stem)
    if match is None:
        raise DataError(f"{stem}: no frame number; name the frames <video>_<number>")
    return match[1], int(match[2])


def usual_step(numbers: Sequence[int]) -> int:
    """The commonest difference of consecutive numbers, the smaller of two; 1 of a single one."""
    steps = Counter(b - a for a, b in pairwise(numbers))
    return max(sorted(steps), key=steps.__getitem__, default=1)


def cuts(numbers: Sequence[int]) -> list[int]:
    """Where parts begin and end: 0, each index after a jump, and the number of frames."""
    step = usual_step(numbers)
    jumps = [i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b - a > 2 * step]
    return [0, *jumps, len(numbers)]
