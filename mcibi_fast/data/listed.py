"""What the published datasets share: lists of images and masks, and a table from mask values to
classes. The file of each dataset then has only its names, its layout and its table.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.archives import Files
from mcibi_fast.data.base import IGNORE_INDEX, SegmentationDataset, Transform
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.images import decode_bytes, decode_colours, fit, mask_indices
from mcibi_fast.data.mat import Matrix, read_variables
from mcibi_fast.data.notes import Notes
from mcibi_fast.defaults import IMAGENET_MEAN, IMAGENET_STD
from mcibi_fast.untrusted import shorten

# In a label map: a value that no mask of the dataset holds. No dataset has 254 classes.
UNKNOWN = 254


class Item(NamedTuple):
    """A sample's name, and the paths of its image and mask among the dataset's files."""

    name: str
    image: str
    label: str


class Listing(NamedTuple):
    """Items that are there, the paths of missing images and masks, and the number listed."""

    items: list[Item]
    missing: list[str]
    listed: int


def value_map(classes: Mapping[int, int], ignored: Sequence[int] = ()) -> NDArray[np.uint8]:
    """(256,) uint8: the class of each mask value, 255 for those ignored (255 itself is one)."""
    table = np.full(256, UNKNOWN, np.uint8)
    table[[*ignored, IGNORE_INDEX]] = IGNORE_INDEX
    for value, index in classes.items():
        table[value] = index
    return table


def colours(text: str) -> NDArray[np.uint8]:
    """A palette (K, 3) from hexadecimal colours with blanks between them."""
    return np.array([list(bytes.fromhex(colour)) for colour in text.split()], np.uint8)


def read_mat(files: Files, path: str, key: str) -> dict[str, Matrix]:
    """The arrays of a MATLAB file, ``key`` among them. Raises DataError when it cannot be read."""
    content, name = files.read(path), files.describe(path)
    if not content:
        raise DataError(f"{name}: empty (0 bytes); replace or remove it")
    try:
        found = read_variables(content, name)
    except DataError:
        raise
    except (ValueError, zlib.error) as error:
        raise DataError(f"{name}: not a whole .mat file ({shorten(error)}); replace it") from error
    if key not in found:
        raise DataError(f"{name}: no {key} in it; replace it")
    return found


class ListedDataset(SegmentationDataset):
    """A published dataset. Subclasses give the class attributes and `listing`.

    Args:
        root: the folder it was unpacked to, its zip file, or the folder that holds its zip files.
        split: a key of ``sizes``.
        transform: see `data.transforms`; None only normalises.

    Class attributes, besides those of `SegmentationDataset`: ``title``; ``layout``, in words;
    ``label_map`` (256,) uint8, see `value_map`; ``sizes``, the images of each published split;
    ``checked``, the splits that together hold every image once.

    Raises DataError, with the file and what to do: at once for missing folders, lists, images and
    masks; and when a sample is read, for a file that cannot be decoded, a mask in colour, sizes
    that differ, and a mask value that the dataset does not have.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    title: ClassVar[str]
    layout: ClassVar[str]
    label_map: ClassVar[NDArray[np.uint8]]
    sizes: ClassVar[dict[str, int]]
    checked: ClassVar[tuple[str, ...]]

    def __init__(self, root: str | Path, split: str, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self.root, self.split = Path(root), split
        self.files = self.open_files(root)
        self.items, missing, _ = self.find(self.files, split)
        if missing:
            more = f" (and {len(missing) - 1} more files)" if len(missing) > 1 else ""
            raise DataError(f"{missing[0]}: missing{more}; unpack {self.title} again")
        if not self.items:
            raise DataError(f"{root}: no images of {split}; expected {self.layout}")

    @classmethod
    def listing(cls, files: Files, split: str) -> list[Item]:
        """What ``split`` should hold, in order. Raises DataError for missing folders and lists."""
        raise NotImplementedError

    @classmethod
    def read_mask(cls, files: Files, path: str) -> NDArray[np.integer]:
        """The values (H, W) of a mask, before the label map."""
        name = files.describe(path)
        return mask_indices(decode_bytes(files.read(path), name), name)

    @classmethod
    def to_submission(cls, label: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Class indices -> the values that the dataset's masks hold, uint8.

        That is what test servers take: ADE20K's 1..150, Cityscapes' label ids. Raises ValueError
        for an index that is no class.
        """
        values = np.full(256, UNKNOWN, np.int64)
        known = np.flatnonzero(cls.label_map < len(cls.classes))
        values[cls.label_map[known]] = known
        label = np.asarray(label)
        bad = (label < 0) | (label >= len(cls.classes))
        if bad.any():
            raise ValueError(
                f"label: {label[bad][0]} is no class of {cls.title}, which has "
                f"0..{len(cls.classes) - 1}"
            )
        return values[label].astype(np.uint8)

    @classmethod
    def open_files(cls, root: str | Path) -> Files:
        """The files under ``root``. Raises DataError when there is no such folder or zip file."""
        return Files(root, cls.layout)

    @classmethod
    def find(cls, files: Files, split: str) -> Listing:
        """The files of ``split`` that exist. Raises DataError for missing folders and lists."""
        if split not in cls.sizes:
            raise DataError(f"{cls.title}: no split {split!r}; there is {', '.join(cls.sizes)}")
        items = cls.listing(files, split)
        folders = {str(PurePosixPath(path).parent) for item in items for path in item[1:]}
        there = {f"{folder}/{name}" for folder in folders for name in files.names(folder)}
        missing = [path for item in items for path in item[1:] if path not in there]
        whole = [item for item in items if item.image in there and item.label in there]
        return Listing(whole, missing, len(items))

    @classmethod
    def read_pair(
        cls, files: Files, image: str, label: str, notes: Notes | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Decode a pair: image (H, W, 3) uint8, label (H, W) uint8. Raises DataError."""
        name, label_name = files.describe(image), files.describe(label)
        decoded = decode_colours(files.read(image), name, notes)
        values = cls.read_mask(files, label)
        pixels = fit(decoded, values, name, label_name, notes)
        return pixels, cls.classes_of(values, label_name)

    @classmethod
    def classes_of(cls, values: NDArray[np.integer], name: str) -> NDArray[np.uint8]:
        """Mask values (H, W) -> classes (H, W) uint8. Raises DataError for an unknown value."""
        small = np.where((values < 0) | (values > 255), UNKNOWN, values).astype(np.uint8)
        label = cls.label_map[small]
        bad = label == UNKNOWN
        if bad.any():
            raise DataError(
                f"{name}: value {values[bad][0]}; the masks of {cls.title} hold "
                f"{_ranges(np.flatnonzero(cls.label_map != UNKNOWN))}; unpack it again"
            )
        return label

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        return self.items[index].name

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """Sample ``index``: image (H, W, 3) uint8, label (H, W) uint8. Raises DataError."""
        item = self.items[index]
        return self.read_pair(self.files, item.image, item.label, self.notes)


def _ranges(values: NDArray[np.integer]) -> str:
    """[0, 1, 2, 255] -> "0..2, 255"."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{r[0]}..{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)
