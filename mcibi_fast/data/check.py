"""Checks a dataset before training on it: `mcibi-fast data check [NAME] ROOT`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.base import IGNORE_INDEX, SegmentationDataset
from mcibi_fast.data.check_doubts import find_doubts
from mcibi_fast.data.check_report import Report, finish, list_splits, read_all
from mcibi_fast.data.check_video import check_vspw, folder_lines
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.folder import (
    BINARY_HINT,
    ClassList,
    check_mapping,
    class_list,
    read_pair,
    split_files,
    splits,
)
from mcibi_fast.data.listing import list_images
from mcibi_fast.data.named import named
from mcibi_fast.data.shards import ShardedDataset, packed_folders
from mcibi_fast.data.vspw import VSPW
from mcibi_fast.viz.palette import distinct_palette


def check(
    root: str | Path,
    out: str | Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    binary: bool = False,
    reduce_labels: bool = False,
    sizes: Mapping[str, int] | None = None,
    videos: bool = False,
    progress: bool = True,
) -> Report:
    """Read every image and mask of every split under ``root``, in the layout of `data.folder`.

    Bad files (empty, corrupt, in colour, wrong in size or labels) and missing masks are collected
    in ``report.problems``, and the check continues. Four overlays of images spread over the usable
    ones are written to the folder ``out``, which is created if needed; None writes none. Without
    ``classes`` and a class list in the folder, the range of the labels cannot be checked. Masks of
    0 and 255 are ``binary`` as in `FolderDataset`, those of 1..K have ``reduce_labels`` as there.
    ``sizes`` gives the number of images that each split should have; another number is a warning.
    With ``videos`` the images are frames, named <video>_<number>, and the report counts them by
    video. Raises DataError when ``root`` is not a dataset of this layout.
    """
    check_mapping(binary, reduce_labels)
    root = Path(root)
    found = class_list(root, classes, binary=binary)
    report = Report(root, listed=found is not None)
    jobs = _collect(report)

    def read(image: str, label: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        return read_pair(
            report.root,
            image,
            label,
            num_classes=_range(found),
            binary=binary,
            reduce_labels=reduce_labels,
            notes=report.notes,
        )

    for split, size in (sizes or {}).items():
        report.expect("the published set", split, sum(job[0] == split for job in jobs), size)
    if videos:
        report.video_lines = folder_lines(jobs)
    good = read_all(report, jobs, read, progress)
    if found is None:
        seen = np.flatnonzero(report.pixels)
        names = [f"class_{i}" for i in range(seen[-1] + 1 if seen.size else 0)]
        found = ClassList(names, distinct_palette(len(names)))
    finish(report, found, good, read, out)
    find_doubts(report, BINARY_HINT, reduce_labels=reduce_labels)
    return report


def check_named(
    name: str, root: str | Path, out: str | Path | None = None, *, progress: bool = True
) -> Report:
    """Like `check`, for the published dataset ``name`` (see `data.DATASETS`), unpacked or zipped.

    Every image is read once. A split of another size than the published one is a warning. Raises
    ValueError for an unknown name and DataError when nothing of the dataset is there.
    """
    dataset = named(name)
    if dataset is VSPW:
        return check_vspw(root, out, progress=progress)
    files, report = dataset.open_files(root), Report(Path(root))
    jobs = []
    for split, listing in list_splits(dataset, files, report).items():
        jobs += [(split, item.image, item.label) for item in listing.items]
        report.expect(dataset.title, split, listing.listed, dataset.sizes[split])

    def read(image: str, label: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        return dataset.read_pair(files, image, label, report.notes)

    good = read_all(report, jobs, read, progress)
    finish(report, ClassList(dataset.classes, dataset.palette), good, read, out)
    return report


def check_shards(
    root: str | Path, out: str | Path | None = None, *, progress: bool = True
) -> Report:
    """Like `check`, for the splits packed in the folder ``root`` (see `data.shards`)."""
    splits = packed_folders(root)
    if not splits:
        raise DataError(f"{root}: no packed splits in it; expected <split>/index.json")
    hint = "if the dataset's masks are binary, pack it again with --binary"
    return check_splits(
        root, {split: partial(ShardedDataset, root, split) for split in splits}, out, hint, progress
    )


def check_splits(
    root: str | Path,
    splits: Mapping[str, Callable[[], SegmentationDataset]],
    out: str | Path | None = None,
    binary_hint: str = "",
    progress: bool = True,
) -> Report:
    """Like `check`, for any dataset.

    Args:
        root: names it in the report.
        splits: opens each split; what it raises is a problem of the report.
        out: see `check`.
        binary_hint: what to do if masks of 0 and 255 are binary ones.
        progress: show how far it is.
    """
    report = Report(Path(root), pairs=dict.fromkeys(splits, 0))
    opened: dict[str, SegmentationDataset] = {}
    for split, opener in splits.items():
        try:
            opened[split] = opener()
        except DataError as error:
            report.problems.append(str(error))
            continue
        opened[split].notes = report.notes

    def read(image: str, label: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        return opened[image.split("/", 1)[0]].read(int(label))

    jobs = [
        (split, f"{split}/{dataset.name(i).removeprefix(f'{split}/')}", str(i))
        for split, dataset in opened.items()
        for i in range(len(dataset))
    ]
    good = read_all(report, jobs, read, progress)
    found = ClassList([], np.zeros((0, 3), np.uint8))
    for split, dataset in opened.items():
        if found.names and found.names != dataset.classes:
            report.problems.append(
                f"{split}: has other classes than {next(iter(opened))}; all splits need the same"
            )
        found = ClassList(dataset.classes, dataset.palette)
    finish(report, found, good, read, out)
    find_doubts(report, binary_hint)
    return report


def _range(found: ClassList | None) -> int:
    """The number of classes to check labels against; with no list, what 8 bits can hold."""
    return IGNORE_INDEX if found is None else len(found.names)


def _collect(report: Report) -> list[tuple[str, str, str]]:
    """(split, image, mask) of every pair; notes missing and spare masks in the report."""
    jobs: list[tuple[str, str, str]] = []
    names = splits(report.root)
    stray = list_images(report.root / "images", nested=False).paths
    if stray:
        report.left_out.append(f"images: {len(stray):,} images in no split (such as {stray[0]})")
    if not names:
        raise DataError(f"{report.root}: no splits in images/; expected images/<split>")
    for split in names:
        report.pairs[split] = 0
        try:
            files = split_files(report.root, split)
        except DataError as error:
            report.problems.append(str(error))
            continue
        report.problems.extend(f"{what}; {cure}" for what, cure in files.problems)
        report.spare.extend(files.spare)
        report.left_out.extend(files.left_out)
        jobs.extend((split, image, label) for image, label in files.pairs)
    return jobs
