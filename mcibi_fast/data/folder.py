"""Datasets in a folder: images, masks of class indices, and a list of class names.

ROOT/images/<split>/<name>.jpg    or another format of `data.images`
ROOT/labels/<split>/<name>.png    one channel or a palette; 0..K-1 a class, 255 ignored
ROOT/classes.txt                  one name per line; or
ROOT/classes.json                 ["name", ...] or {"classes": [...], "palette": [[r, g, b], ...]}

A split may have subfolders, the same for images and labels; <name> then has them in it. Masks may
also be TIFF or BMP; a PNG comes first. Of images with one name, none may have the mask.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.base import IGNORE_INDEX, SegmentationDataset, Transform
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.images import (
    IMAGE_SUFFIXES,
    decode,
    fit,
    mask_indices,
    read_colours,
)
from mcibi_fast.data.labels import REDUCE_HINT, binary_classes, check_labels, reduced_labels
from mcibi_fast.data.listing import is_hidden, list_images
from mcibi_fast.data.notes import Notes
from mcibi_fast.data.reading import check_class_names, palette_rows, read_regular
from mcibi_fast.data.shard_index import INDEX
from mcibi_fast.defaults import IMAGENET_MEAN, IMAGENET_STD
from mcibi_fast.errors import and_more
from mcibi_fast.terminal import warn
from mcibi_fast.untrusted import decode_text, parse_json
from mcibi_fast.viz.palette import distinct_palette

CAMVID_CLASSES = [
    "sky", "building", "pole", "road", "pavement", "tree",
    "sign symbol", "fence", "car", "pedestrian", "bicyclist",
]  # fmt: skip
CAMVID_SIZES = {"train": 367, "val": 101, "test": 233}

# Of a mask's formats the first that is there; others are refused when they are read.
_MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
_BINARY = ["background", "foreground"]
BINARY_HINT = (
    "if these are binary masks, map 255 to class 1: data.binary=true (--set data.binary=true with "
    "train; --binary with data check, data pack and evaluate)"
)


class FolderDataset(SegmentationDataset):
    """Images and masks under ``root``, in the layout of this module's docstring.

    Args:
        root: the dataset's folder.
        split: a folder under ``images`` and ``labels``.
        transform: see `data.transforms`; None only normalises.
        classes: names of the K classes, such as `CAMVID_CLASSES`; None reads ``classes.json`` or
            ``classes.txt``, and without either counts the classes in all masks of all splits and
            calls them class_0, class_1, ...
        binary: masks hold 0 and 255 (or 1), and 255 is class 1 instead of ignored; the classes are
            called background and foreground if they are not listed.
        reduce_labels: label 0 is ignored and the others are one class lower: masks hold 1..K.

    ``mean`` and ``std`` are ImageNet's. Samples are dictionaries: ``image`` (3, H, W) float32,
    ``label`` (H, W) uint8, ``name`` the image's path in the split without its ending. A
    `DataWarning` says which files there are left out. Raises DataError, naming the file, for a
    missing folder or mask and for two images of one name at once, and when a sample is read for an
    image or mask that cannot be decoded, a mask in colour, sizes that differ, and a label outside
    0..K-1 (1..K with ``reduce_labels``) that is not ignored. Raises ValueError for ``binary`` and
    ``reduce_labels`` at once.
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
        binary: bool = False,
        reduce_labels: bool = False,
    ) -> None:
        super().__init__(transform)
        self.root, self.split = Path(root), split
        self.binary, self.reduce_labels = binary, reduce_labels
        check_mapping(binary, reduce_labels)
        files = split_files(self.root, split)
        if files.problems:
            more = and_more(len(files.problems))
            what, cure = files.problems[0]
            raise DataError(f"{what}{more}; {cure}")
        if files.visible:
            warn(f"{self.root}: images/{split}: left out {files.visible}")
        self.pairs = files.pairs
        found = class_list(self.root, classes, binary=binary)
        if found is None:
            names = [f"class_{i}" for i in range(_count_classes(self.root, reduce_labels))]
            found = ClassList(names, distinct_palette(len(names)))
        self.classes, self.palette = found

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return sample_name(self.pairs[index][0])

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """Sample ``index``: image (H, W, 3) uint8, label (H, W) uint8. Raises DataError."""
        return self.read_pair(self.pairs[index])

    def read_pair(self, pair: tuple[str, str]) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """As `read`, for an element of ``pairs``."""
        image, label = read_pair(
            self.root,
            *pair,
            num_classes=self.num_classes,
            binary=self.binary,
            reduce_labels=self.reduce_labels,
            notes=self.notes,
        )
        return image, label.astype(np.uint8)


class ClassList(NamedTuple):
    names: list[str]
    palette: NDArray[np.uint8]  # (K, 3)


class SplitFiles(NamedTuple):
    """The files of a split, by paths relative to the root.

    Attributes:
        pairs: (image, mask).
        problems: images that cannot be used, each as (what is wrong, what to do).
        spare: masks without an image.
        left_out: lines on what else lies there.
        visible: what is left out of the images, hidden files apart; "" if nothing is.
    """

    pairs: list[tuple[str, str]]
    problems: list[tuple[str, str]]
    spare: list[str]
    left_out: list[str]
    visible: str


def splits(root: str | Path) -> list[str]:
    """Names of the splits under ``root``. Raises DataError when it is not a dataset's folder."""
    images = Path(root) / "images"
    if not images.is_dir():
        broken = sorted(Path(root).glob(f"*/{INDEX}"))
        raise DataError(
            f"{root}: no folder 'images' in it; expected images/<split> and labels/<split>"
            + (f" ({broken[0]} is not an index of shards, either)" if broken else "")
        )
    return sorted(p.name for p in images.iterdir() if p.is_dir() and not is_hidden(p.name))


def split_files(root: Path, split: str) -> SplitFiles:
    """The files of a split's images and labels. Raises DataError if there are none."""
    known = splits(root)
    if split not in known:
        raise DataError(f"{root}: no split {split!r}; there is {', '.join(known) or 'none'}")
    images, labels = f"images/{split}", f"labels/{split}"
    found = list_images(root / images)
    if not found.paths:
        left_out = found.describe()
        raise DataError(
            f"{root / images}: no .jpg or other image in it "
            f"({', '.join(sorted(IMAGE_SUFFIXES))})"
            + (f"; left out {left_out}" if left_out else "")
        )
    masks = list_images(root / labels) if (root / labels).is_dir() else None
    best: dict[str, str] = {}  # of each name
    spare = []
    for path in sorted(masks.paths if masks else (), key=_mask_rank):
        if best.setdefault(_key(path), path) != path:
            spare.append(f"{labels}/{path}")
    names: dict[str, list[str]] = {}
    for path in found.paths:
        names.setdefault(_key(path), []).append(path)
    pairs, problems = [], []
    for key, paths in names.items():
        mask, name = best.pop(key, None), os.path.splitext(paths[0])[0]
        if mask is None:
            what = f"{labels}/{name}.png: missing mask"
            problems.append((what, f"add it, or remove its image from {images}"))
        elif len(paths) > 1:
            what = f"{images}/{paths[0]}: has the name, and so the mask, of {images}/{paths[1]}"
            problems.append((what, "rename one of them and its mask, or remove it"))
        else:
            pairs.append((f"{images}/{paths[0]}", f"{labels}/{mask}"))
    spare += [f"{labels}/{path}" for path in best.values()]
    others = [
        f"{folder}: {text}"
        for folder, listed in ((images, found), (labels, masks))
        if listed and (text := listed.describe())
    ]
    return SplitFiles(pairs, problems, sorted(spare), others, found.describe(hidden=False))


def sample_name(image: str) -> str:
    """ "images/train/a/b.jpg" -> "a/b"."""
    return os.path.splitext(image.split("/", 2)[2])[0]


def _key(path: str) -> str:
    """What an image and its mask have in common: letters with accents have two spellings."""
    return unicodedata.normalize("NFC", os.path.splitext(path)[0])


def _mask_rank(path: str) -> tuple[int, str]:
    suffix = os.path.splitext(path)[1].lower()
    known = suffix in _MASK_SUFFIXES
    return _MASK_SUFFIXES.index(suffix) if known else len(_MASK_SUFFIXES), path


def read_pair(
    root: Path,
    image: str,
    label: str,
    *,
    num_classes: int | None,
    binary: bool = False,
    reduce_labels: bool = False,
    notes: Notes | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    """Decode a pair: image (H, W, 3) uint8, label (H, W); None leaves the range unchecked.

    Raises DataError, one line that begins with the file's path relative to ``root``.
    """
    decoded = read_colours(root / image, image, notes)
    indices = read_label(
        root, label, num_classes=num_classes, binary=binary, reduce_labels=reduce_labels
    )
    return fit(decoded, indices, image, label, notes), indices


def read_label(
    root: Path,
    path: str,
    *,
    num_classes: int | None,
    binary: bool = False,
    reduce_labels: bool = False,
) -> NDArray[np.integer]:
    """Decode a mask into class indices (H, W). Raises DataError as `read_pair` does."""
    indices = mask_indices(decode(root / path, path), path)
    if binary:
        return binary_classes(indices, path)
    if reduce_labels:  # of which a mask has at most those of 8 bits
        return reduced_labels(indices, IGNORE_INDEX if num_classes is None else num_classes, path)
    if num_classes is not None:
        check_labels(indices, num_classes, path, hint=REDUCE_HINT)
    return indices


def check_mapping(binary: bool, reduce_labels: bool) -> None:
    """Raises ValueError for both at once."""
    if binary and reduce_labels:
        raise ValueError(
            "binary and reduce_labels: give one of them; label 0 is the background with binary, "
            "and is ignored with reduce_labels"
        )


def class_list(
    root: Path, classes: Sequence[str] | None = None, *, binary: bool = False
) -> ClassList | None:
    """The classes given, or those ``root`` lists, with a palette; None when it lists none.

    Those of binary masks are always two.
    """
    source, palette = "classes", None
    if classes is None and (root / "classes.json").is_file():
        source = "classes.json"
        classes, palette = _parse_json(_text(root, source), source)
    elif classes is None and (root / "classes.txt").is_file():
        source = "classes.txt"
        lines = _text(root, source).splitlines()
        classes = [line.strip() for line in lines if line.strip()]
    if classes is None and binary:
        source, classes = "classes", _BINARY
    if classes is None:
        return None
    names = list(classes)
    if binary and len(names) == 1:
        names = [_BINARY[0], *names]  # the foreground's
        palette = None
    if binary and len(names) != 2:
        raise DataError(f"{source}: {len(names)} classes, but binary masks have 2")
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


def _count_classes(root: Path, reduce_labels: bool) -> int:
    """Classes in the masks of all splits; all of them, so that every split has the same K."""
    highest, ignored = -1, False
    for split in splits(root):
        for _, label in split_files(root, split).pairs:
            indices = read_label(root, label, num_classes=IGNORE_INDEX, reduce_labels=reduce_labels)
            used = indices[indices != IGNORE_INDEX]
            ignored |= used.size < indices.size
            highest = max(highest, int(used.max()) if used.size else -1)
    if highest < 0:
        values = f"0 or {IGNORE_INDEX}" if reduce_labels else f"{IGNORE_INDEX}"
        raise DataError(f"{root}: every pixel of every mask is {values}; no classes found")
    if highest == 0 and ignored:
        raise DataError(f"{root}: {one_class('its', reduce_labels, BINARY_HINT)}")
    return highest + 1


def one_class(whose: str, reduce_labels: bool, hint: str) -> str:
    """That masks have one class and ignored pixels.

    Args:
        whose: "its" or "the".
        reduce_labels: see `FolderDataset`.
        hint: what to do if masks of 0 and 255 are binary ones.
    """
    if reduce_labels:
        return (
            f"{whose} masks hold 1 only, besides 0 and {IGNORE_INDEX}, which reduce_labels "
            "ignores; that leaves one class; if 0 is a class, too, leave out reduce_labels"
        )
    return (
        f"{whose} masks hold 0 and {IGNORE_INDEX} only, and {IGNORE_INDEX} is ignored, which "
        f"leaves one class; {hint}"
    )
