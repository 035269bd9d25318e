"""`mcibi-fast data check` of video datasets: frames per video, frames that are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.check_report import Report, finish, list_splits, read_all
from mcibi_fast.data.folder import ClassList, sample_name
from mcibi_fast.data.folder_video import split_stem, usual_step
from mcibi_fast.data.images import decode_colours, fit
from mcibi_fast.data.listed import Item
from mcibi_fast.data.vspw import VSPW, by_video

_DIGITS = 18  # of a frame's number; longer ones are names
_Numbers = Mapping[str, Sequence[int]]  # of each video, its frames' numbers in order


def check_vspw(root: str | Path, out: str | Path | None = None, *, progress: bool = True) -> Report:
    """Like `check_named`; also counts videos, frames, missing frames and unknown mask values.

    Frames without a mask, which ``test`` may have, are decoded, too. ``report.pairs`` counts the
    frames with a mask.
    """
    files, report = VSPW.open_files(root), Report(Path(root))
    jobs = []
    for split, listing in list_splits(VSPW, files, report).items():
        jobs += [(split, item.image, item.label) for item in listing.items]
        videos = by_video(listing.items)
        report.video_lines += video_lines(split, {v: _numbers(x) for v, x in videos.items()})
        bare = sum(not item.label for item in listing.items)
        if bare:
            report.video_lines.append(f"{'':8} {bare:,} frames of {split} have no mask")
        report.expect(VSPW.title, split, len(videos), VSPW.video_counts[split], "videos")
        report.expect(VSPW.title, split, listing.listed, VSPW.sizes[split])
    odd, masks = np.zeros(256, np.int64), 0

    def read(image: str, label: str) -> tuple[NDArray[np.uint8], NDArray[np.integer] | None]:
        nonlocal odd, masks
        name, label_name = files.describe(image), files.describe(label)
        decoded = decode_colours(files.read(image), name, report.notes)
        if not label:
            return decoded.pixels, None
        values = VSPW.read_mask(files, label)
        pixels = fit(decoded, values, name, label_name, report.notes)
        counts = VSPW.odd(values)
        odd, masks = odd + counts, masks + bool(counts.any())
        return pixels, VSPW.classes_of(values, label_name)

    good = read_all(report, jobs, read, progress)
    if masks:
        values = ", ".join(f"{v} ({odd[v]:,})" for v in np.flatnonzero(odd))
        report.warnings.append(
            f"{masks} masks hold values that are no class; the pixels are ignored: {values}"
        )
    finish(report, ClassList(VSPW.class_names(files), VSPW.palette), good, read, out)
    return report


def _numbers(items: Sequence[Item]) -> list[int]:
    """The numbers of a video's frames; their positions if the names are not numbers."""
    stems = [PurePosixPath(item.name).name for item in items]
    numbered = all(stem.isdecimal() and len(stem) <= _DIGITS for stem in stems)
    return [int(stem) for stem in stems] if numbered else [*range(len(stems))]


def folder_lines(jobs: Sequence[tuple[str, str, str]]) -> list[str]:
    """`video_lines` of each split of (split, image, mask), whose images are <video>_<number>."""
    splits: dict[str, dict[str, list[int]]] = {}
    for split, image, _ in jobs:
        video, number = split_stem(sample_name(image))
        splits.setdefault(split, {}).setdefault(video, []).append(number)
    return [
        line
        for split, videos in splits.items()
        for line in video_lines(
            split, {video: sorted(numbers) for video, numbers in videos.items()}
        )
    ]


def video_lines(split: str, videos: _Numbers) -> list[str]:
    """A report's lines about a split's videos: how many frames they have, how many are missing."""
    counts = np.array([len(numbers) for numbers in videos.values()])
    if counts.size == 0:
        return []
    spread = f"{counts.min()}..{counts.max()} frames, median {np.median(counts):g}"
    lines = [f"videos   {split} {len(counts):,} ({spread})"]
    gaps = {name: count for name, numbers in videos.items() if (count := absent(numbers))}
    if gaps:
        worst = max(gaps, key=lambda name: gaps[name])
        lines.append(
            f"{'':8} {sum(gaps.values()):,} frame numbers of {split} are left out, in "
            f"{len(gaps)} videos; most in {worst} ({gaps[worst]:,})"
        )
    return lines


def absent(numbers: Sequence[int]) -> int:
    """How many frames are missing where consecutive numbers are farther apart than usual."""
    step = max(usual_step(numbers), 1)
    return sum(max(round((b - a) / step) - 1, 0) for a, b in pairwise(numbers))
