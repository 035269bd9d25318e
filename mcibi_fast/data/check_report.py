"""What `data check` finds: collected, printed, drawn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.archives import Files
from mcibi_fast.data.base import IGNORE_INDEX
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.folder import ClassList
from mcibi_fast.data.listed import ListedDataset, Listing
from mcibi_fast.data.notes import Notes
from mcibi_fast.files import new_file
from mcibi_fast.progress import track
from mcibi_fast.terminal import printable
from mcibi_fast.viz.overlay import blend, grid

_OVERLAYS = 4
_BAR = 30
_SHOWN = 50
_LONGEST_STEM = 60  # characters of up to 4 bytes; the name of a file has up to 255 bytes
# A frame of a video may have no mask: None.
_Read = Callable[[str, str], tuple[NDArray[np.uint8], NDArray[np.integer] | None]]


@dataclass
class Report:
    """What `check` or `check_named` found.

    ``pixels`` and ``images`` (K,) count the pixels of each class and the images it occurs in,
    ``sizes`` the images of each (width, height), ``pairs`` the usable pairs of each split.
    ``labelled`` counts the pixels of each split that are not ignored. ``problems`` holds one line
    per bad or missing file, ``doubts`` one for each thing that is implausible, ``warnings`` one per
    split whose size is not the published one, ``spare`` the masks that are not used, such as those
    without an image (they do no harm), ``left_out`` lines on other files, ``overlays`` the pictures
    written, ``video_lines`` the lines about videos. ``notes`` is for what is read.
    """

    root: Path
    classes: list[str] = field(default_factory=list)
    listed: bool = True  # False: the names were made up from the labels found
    pairs: dict[str, int] = field(default_factory=dict)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    images: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    ignored: int = 0
    labelled: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    overlays: list[Path] = field(default_factory=list)
    video_lines: list[str] = field(default_factory=list)
    notes: Notes = field(default_factory=lambda: Notes(aloud=False))

    @property
    def ok(self) -> bool:
        return not self.problems

    def expect(self, title: str, split: str, count: int, size: int, unit: str = "images") -> None:
        """Notes a split of another size than the published one."""
        if count != size:
            self.warnings.append(f"{split} has {count:,} {unit}; in {title} it has {size:,}")

    def text(self) -> str:
        """The report to print."""
        lines = [f"{self.root}"]
        lines.append("splits   " + ", ".join(f"{name} {n}" for name, n in self.pairs.items()))
        lines.extend(self.video_lines)
        common = self.sizes.most_common(5)
        sizes = ", ".join(f"{w}x{h} ({n})" for (w, h), n in common)
        more = len(self.sizes) - len(common)
        lines.append(f"sizes    {sizes or 'none'}" + (f" and {more} more" if more else ""))
        note = "" if self.listed else " (no class list: counted from the labels)"
        lines.append(f"classes  {len(self.classes)}{note}")
        lines.extend(self._histogram())
        if self.spare:
            lines.append(f"{len(self.spare)} masks without an image, such as {self.spare[0]}")
        lines.extend(f"left out {line}" for line in self.left_out)
        lines.extend(f"overlay  {path}" for path in self.overlays)
        lines.extend(f"warning  {line}" for line in [*self.warnings, *self.doubts])
        if self.ok and self.doubts:
            lines.append("every file can be read, but look at the warnings before training")
        elif self.ok:
            lines.append("no problems")
        else:
            lines.append(f"{len(self.problems)} problems:")
            lines.extend(f"  {line}" for line in self.problems[:_SHOWN])
            if len(self.problems) > _SHOWN:
                lines.append(f"  and {len(self.problems) - _SHOWN} more")
        return "\n".join(map(printable, lines))

    def _histogram(self) -> list[str]:
        labelled = int(self.pixels.sum())
        if labelled == 0:
            return []
        share = self.pixels / labelled
        names = [printable(name) for name in self.classes]
        wide = max(len(name) for name in [*names, "ignored"])
        lines = [f"{'':{wide + 4}} share of labelled pixels, images"]
        for i, name in enumerate(names):
            bar = "#" * round(_BAR * share[i] / share.max())
            lines.append(f"{i:3d} {name:{wide}} {share[i]:7.2%} {self.images[i]:6d} {bar}")
        of_all = self.ignored / (labelled + self.ignored)
        lines.append(f"{IGNORE_INDEX:3d} {'ignored':{wide}} {of_all:7.2%}        of all pixels")
        return lines


def list_splits(dataset: type[ListedDataset], files: Files, report: Report) -> dict[str, Listing]:
    """The files of each split that exists; what is missing becomes problems of the report.

    Raises:
        DataError: there are no files at all.
    """
    found = {}
    for split in dataset.checked:
        report.pairs[split] = 0
        try:
            found[split] = dataset.find(files, split)
        except DataError as error:
            report.problems.append(str(error))
            continue
        report.problems += [f"{path}: missing" for path in found[split].missing]
    if not any(listing.listed for listing in found.values()):
        raise DataError(
            report.problems[0] if report.problems else f"{report.root}: no images in it"
        )
    return found


def read_all(
    report: Report, jobs: list[tuple[str, str, str]], read: _Read, progress: bool
) -> list[tuple[str, str]]:
    """Reads every (split, image, mask), adds to the report, and returns the usable pairs."""
    report.pixels = np.zeros(IGNORE_INDEX, np.int64)
    report.images = np.zeros(IGNORE_INDEX, np.int64)
    good = []
    for split, image, label in track(jobs, "data check", unit="image", show=progress, leave=True):
        try:
            pixels, indices = read(image, label)
        except DataError as error:
            report.problems.append(str(error))
            continue
        report.sizes[pixels.shape[1], pixels.shape[0]] += 1
        if indices is None:
            continue
        counts = np.bincount(indices.ravel(), minlength=IGNORE_INDEX + 1)
        report.pixels += counts[:IGNORE_INDEX]
        report.images += counts[:IGNORE_INDEX] > 0
        report.ignored += int(counts[IGNORE_INDEX])
        report.labelled[split] += int(counts[:IGNORE_INDEX].sum())
        report.pairs[split] += 1
        good.append((image, label))
    report.doubts += report.notes.lines()
    return good


def finish(
    report: Report,
    found: ClassList,
    good: list[tuple[str, str]],
    read: _Read,
    out: str | Path | None,
) -> None:
    report.classes = found.names
    report.pixels = report.pixels[: len(found.names)]
    report.images = report.images[: len(found.names)]
    if out is not None and good:
        _write_overlays(report, good, read, found, Path(out))


def _write_overlays(
    report: Report, good: list[tuple[str, str]], read: _Read, found: ClassList, out: Path
) -> None:
    """Image and overlay side by side, for pairs spread evenly over the good ones."""
    out.mkdir(parents=True, exist_ok=True)
    spread = np.linspace(0, len(good) - 1, min(_OVERLAYS, len(good))).astype(int)
    for number, chosen in enumerate(spread, start=1):
        image, label = good[chosen]
        pixels, indices = read(image, label)
        assert indices is not None
        sheet = grid([[pixels, blend(pixels, indices, found.palette)]], captions=[image])
        stem = re.sub(r"[^\w .-]", "_", Path(image).stem)[:_LONGEST_STEM]
        path = out / f"overlay_{number}_{stem}.png"
        with new_file(path, sync=False) as file:
            sheet.save(file, "PNG")
        report.overlays.append(path)
