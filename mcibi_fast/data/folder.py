"""Datasets in a folder: images, masks of class indices, and a list of class names.

ROOT/images/<split>/<name>.jpg    (or .jpeg, .png)
ROOT/labels/<split>/<name>.png    one channel or a palette; 0..K-1 a class, 255 ignored
ROOT/classes.txt                  one name per line; or
ROOT/classes.json                 ["name", ...] or {"classes": [...], "palette": [[r, g, b], ...]}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.base import IGNORE_INDEX, SegmentationDataset, Transform
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.images import check_labels, check_sizes, decode, mask_indices, read_pixels
from mcibi_fast.data.reading import check_class_names, palette_rows, read_regular
from mcibi_fast.untrusted import decode_text, parse_json
from mcibi_fast.viz.palette import distinct_palette

CAMVID_CLASSES = [
    "sky", "building", "pole", "road", "pavement", "tree",
    "sign symbol", "fence", "car", "pedestrian", "bicyclist",
]  # fmt: skip
CAMVID_SIZES = {"train": 367, "val": 101, "test": 233}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}


class FolderDataset(SegmentationDataset):
    """Images and masks under ``root``, in the layout of this module's docstring.

    Args:
        root: the dataset's folder.
        split: a folder under ``images`` and ``labels``.
        transform: see `data.transforms`; None only normalises.
        classes: names of the K classes, such as `CAMVID_CLASSES`; None reads ``classes.json`` or
            ``classes.txt``, and without either counts the classes in all masks of all splits and
            calls them class_0, class_1, ...

    ``mean`` and ``std`` are ImageNet's. Samples are dictionaries: ``image`` (3, H, W) float32,
    ``label`` (H, W) uint8, ``name`` the file's stem. Raises DataError, naming the file, for a
    missing folder or mask at once, and when a sample is read for an image or mask that cannot be
    decoded, a mask in colour, sizes that differ, and a label outside 0..K-1 that is not 255.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Transform | None = None,
        *,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(transform)
        self.root, self.split = Path(root), split
        files = split_files(self.root, split)
        if files.missing:
            more = f" (and {len(files.missing) - 1} more)" if len(files.missing) > 1 else ""
            raise DataError(
                f"{files.missing[0]}: missing mask{more}; add it, or remove its image from "
                f"images/{split}"
            )
        self.pairs = files.pairs
        found = class_list(self.root, classes)
        if found is None:
            names = [f"class_{i}" for i in range(_count_classes(self.root))]
            found = ClassList(names, distinct_palette(len(names)))
        self.classes, self.palette = found

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return Path(self.pairs[index][0]).stem

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """Sample ``index``: image (H, W, 3) uint8, label (H, W) uint8. Raises DataError."""
        image, label = read_pair(self.root, *self.pairs[index], num_classes=self.num_classes)
        return image, label.astype(np.uint8)


class ClassList(NamedTuple):
    names: list[str]
    palette: NDArray[np.uint8]  # (K, 3)


class SplitFiles(NamedTuple):
    """Paths relative to the root, sorted: (image, mask) pairs, missing masks, spare masks."""

    pairs: list[tuple[str, str]]
    missing: list[str]
    spare: list[str]


def splits(root: str | Path) -> list[str]:
    """Names of the splits under ``root``. Raises DataError when it is not a dataset's folder."""
    images = Path(root) / "images"
    if not images.is_dir():
        raise DataError(
            f"{root}: no folder 'images' in it; expected images/<split> and labels/<split>"
        )
    return sorted(p.name for p in images.iterdir() if p.is_dir())


def split_files(root: Path, split: str) -> SplitFiles:
    """The files of a split's images and labels. Raises DataError if there are none."""
    known = splits(root)
    if split not in known:
        raise DataError(f"{root}: no split {split!r}; there is {', '.join(known) or 'none'}")
    images = sorted(
        p.name for p in (root / "images" / split).iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES
    )
    if not images:
        raise DataError(f"{root / 'images' / split}: no .jpg, .jpeg or .png in it")
    folder = root / "labels" / split
    masks = {p.stem for p in folder.iterdir() if p.suffix == ".png"} if folder.is_dir() else set()
    wanted = {name: Path(name).stem for name in images}
    return SplitFiles(
        [
            (f"images/{split}/{name}", f"labels/{split}/{stem}.png")
            for name, stem in wanted.items()
            if stem in masks
        ],
        [f"labels/{split}/{stem}.png" for stem in wanted.values() if stem not in masks],
        [f"labels/{split}/{stem}.png" for stem in sorted(masks - set(wanted.values()))],
    )


def read_pair(
    root: Path, image: str, label: str, *, num_classes: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    """Decode a pair: image (H, W, 3) uint8, label (H, W); None leaves the range unchecked.

    Raises DataError, one line that begins with the file's path relative to ``root``.
    """
    pixels = read_pixels(root / image, image)
    indices = read_label(root, label, num_classes=num_classes)
    check_sizes(pixels, indices, image, label)
    return pixels, indices


def read_label(root: Path, path: str, *, num_classes: int | None) -> NDArray[np.integer]:
    """Decode a mask into class indices (H, W). Raises DataError as `read_pair` does."""
    indices = mask_indices(decode(root / path, path), path)
    if num_classes is not None:
        check_labels(indices, num_classes, path)
    return indices


def class_list(root: Path, classes: Sequence[str] | None = None) -> ClassList | None:
    """The classes given, or those ``root`` lists, with a palette; None when it lists none."""
    source, palette = "classes", None
    if classes is None and (root / "classes.json").is_file():
        source = "classes.json"
        classes, palette = _parse_json(_text(root, source), source)
    elif classes is None and (root / "classes.txt").is_file():
        source = "classes.txt"
        lines = _text(root, source).splitlines()
        classes = [line.strip() for line in lines if line.strip()]
    if classes is None:
        return None
    names = list(classes)
    check_class_names(names, source)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{source}: class {twice!r} is listed twice")
    return ClassList(names, distinct_palette(len(names)) if palette is None else palette)


def _text(root: Path, source: str) -> str:
    try:
        return decode_text(read_regular(root / source, source, "MAX_TEXT_BYTES"))
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{source}: {error}") from error


def _parse_json(text: str, source: str) -> tuple[list[str], NDArray[np.uint8] | None]:
    expected = 'expected ["name", ...] or {"classes": [...], "palette": [[r, g, b], ...]}'
    try:
        content = parse_json(text)
    except ValueError as error:
        raise DataError(f"{source}: {error}; {expected}") from error
    entry = content if isinstance(content, dict) else {"classes": content}
    names, colours = entry.get("classes"), entry.get("palette")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{source}: {expected}")
    if colours is None:
        return names, None
    return names, palette_rows(colours, len(names), source)


def _count_classes(root: Path) -> int:
    """Classes in the masks of all splits; all of them, so that every split has the same K."""
    highest = -1
    for split in splits(root):
        for _, label in split_files(root, split).pairs:
            indices = read_label(root, label, num_classes=IGNORE_INDEX)
            used = indices[indices != IGNORE_INDEX]
            highest = max(highest, int(used.max()) if used.size else -1)
    if highest < 0:
        raise DataError(f"{root}: every pixel of every mask is {IGNORE_INDEX}; no classes found")
    return highest + 1
