"""Checks a dataset before training on it: `mcibi-fast data check [NAME] ROOT`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.base import IGNORE_INDEX
from mcibi_fast.data.check_report import Report, finish, list_splits, read_all
from mcibi_fast.data.check_video import check_vspw, folder_lines
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.folder import ClassList, class_list, read_pair, split_files, splits
from mcibi_fast.data.named import named
from mcibi_fast.data.shards import ShardedDataset, local_splits
from mcibi_fast.data.vspw import VSPW
from mcibi_fast.viz.palette import distinct_palette


def check(
    root: str | Path,
    out: str | Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    sizes: Mapping[str, int] | None = None,
    videos: bool = False,
    progress: bool = True,
) -> Report:
    """Read every image and mask of every split under ``root``, in the layout of `data.folder`.

    Bad files (empty, corrupt, in colour, wrong in size or labels) and missing masks are collected
    in ``report.problems``, and the check continues. Four overlays of images spread over the usable
    ones are written to the folder ``out``, which is created if needed; None writes none. Without
    ``classes`` and a class list in the folder, the range of the labels cannot be checked. ``sizes``
    gives the number of images that each split should have; another number is a warning. With
    ``videos`` the images are frames, named <video>_<number>, and the report counts them by video.
    Raises DataError when ``root`` is not a dataset of this layout.
    """
    root = Path(root)
    found = class_list(root, classes)
    report = Report(root, listed=found is not None)
    jobs = _collect(report)

    def read(image: str, label: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        return read_pair(report.root, image, label, num_classes=_range(found))

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
        return dataset.read_pair(files, image, label)

    good = read_all(report, jobs, read, progress)
    finish(report, ClassList(dataset.classes, dataset.palette), good, read, out)
    return report


def check_shards(
    root: str | Path, out: str | Path | None = None, *, progress: bool = True
) -> Report:
    """Like `check`, for the splits packed in the folder ``root`` (see `data.shards`)."""
    packed = {split: ShardedDataset(root, split) for split in local_splits(root)}
    if not packed:
        raise DataError(f"{root}: no packed splits in it; expected <split>/index.json")
    report = Report(Path(root), pairs=dict.fromkeys(packed, 0))
    places = {
        f"{split}/{dataset.name(i)}": (dataset, i)
        for split, dataset in packed.items()
        for i in range(len(dataset))
    }

    def read(image: str, label: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        dataset, index = places[image]
        return dataset.read(index)

    jobs = [(dataset.split, name, name) for name, (dataset, _) in places.items()]
    good = read_all(report, jobs, read, progress)
    first = next(iter(packed.values()))
    finish(report, ClassList(first.classes, first.palette), good, read, out)
    return report


def _range(found: ClassList | None) -> int:
    """The number of classes to check labels against; with no list, what 8 bits can hold."""
    return IGNORE_INDEX if found is None else len(found.names)


def _collect(report: Report) -> list[tuple[str, str, str]]:
    """(split, image, mask) of every pair; notes missing and spare masks in the report."""
    jobs: list[tuple[str, str, str]] = []
    names = splits(report.root)
    if not names:
        raise DataError(f"{report.root}: no splits in images/; expected images/<split>")
    for split in names:
        report.pairs[split] = 0
        try:
            files = split_files(report.root, split)
        except DataError as error:
            report.problems.append(str(error))
            continue
        report.problems.extend(f"{path}: missing mask" for path in files.missing)
        report.spare.extend(files.spare)
        jobs.extend((split, image, label) for image, label in files.pairs)
    return jobs
