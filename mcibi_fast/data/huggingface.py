"""Datasets of Hugging Face's library `datasets`, from a folder that ``save_to_disk`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.base import IGNORE_INDEX, SegmentationDataset, Transform
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.folder import IMAGENET_MEAN, IMAGENET_STD, ClassList, class_list
from mcibi_fast.data.images import (
    Decoded,
    decode_bytes,
    decode_colours,
    fit,
    mask_indices,
)
from mcibi_fast.data.labels import REDUCE_HINT, check_labels, reduced_labels
from mcibi_fast.extras import load
from mcibi_fast.untrusted import shorten
from mcibi_fast.viz.palette import distinct_palette

WHOLE = "train"  # the split of a folder that holds one Dataset and no DatasetDict


class HuggingFaceDataset(SegmentationDataset):
    """A split of a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote.

    Args:
        source: the folder, or a ``datasets.Dataset``.
        split: which of a DatasetDict's datasets; a folder with one Dataset is the split "train".
        transform: see `data.transforms`; None only normalises.
        image, label: names of the columns: of ``datasets.Image``, or the label of arrays (H, W).
        classes: names of the K classes; None reads ``classes.json`` or ``classes.txt`` in the
            folder, and without either counts the classes in all labels of all splits and calls them
            class_0, class_1, ...
        reduce_labels: label 0 is ignored and the others are one class lower, as Transformers'
            ``do_reduce_labels`` does it for ADE20K.

    Images are decoded by this package's rules, not by `datasets`. Names are the split and the row's
    number. Raises DataError, naming the folder or the row: at once for a missing split or column,
    and when a sample is read for what is wrong in it.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(
        self,
        source: str | Path | Any,
        split: str = WHOLE,
        transform: Transform | None = None,
        *,
        image: str = "image",
        label: str = "label",
        classes: Sequence[str] | None = None,
        reduce_labels: bool = False,
    ) -> None:
        super().__init__(transform)
        self.split, self.columns, self.reduce_labels = split, (image, label), reduce_labels
        if isinstance(source, (str, Path)):
            self.root, splits = str(source), open_splits(source)
        else:
            self.root, splits = split, {split: source}
        if split not in splits:
            raise DataError(f"{self.root}: no split {split!r}; there is {', '.join(splits)}")
        self.rows = self._chosen(splits[split])
        found = class_list(Path(self.root), classes)
        if found is None:
            names = [f"class_{i}" for i in range(self._count_classes(splits))]
            found = ClassList(names, distinct_palette(len(names)))
        self.classes, self.palette = found

    def _chosen(self, dataset: Any) -> Any:
        """The two columns, whose images stay as they are stored."""
        library: Any = load("Hugging Face's datasets", "datasets")
        for option, column in zip(("image", "label"), self.columns, strict=True):
            if column not in dataset.column_names:
                raise DataError(
                    f"{self.root}: no column {column!r}; it has "
                    f"{shorten(', '.join(dataset.column_names))}; name the column with "
                    f"data.{option}=NAME"
                )
        dataset = dataset.select_columns([*dict.fromkeys(self.columns)]).with_format(None)
        for column in self.columns:
            if isinstance(dataset.features[column], library.Image):
                dataset = dataset.cast_column(column, library.Image(decode=False))
        if not len(dataset):
            raise DataError(f"{self.root}: no rows in the split {self.split!r}")
        return dataset

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.split}/{index:06}"

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """Sample ``index``: image (H, W, 3) uint8, label (H, W) uint8. Raises DataError."""
        row, name = self.rows[index], self.name(index)
        content = _content(row[self.columns[0]], f"{name} ({self.columns[0]})")
        decoded: Decoded = decode_colours(content, name, self.notes)
        label = self._label(row[self.columns[1]], name, len(self.classes)).astype(np.uint8)
        return fit(decoded, label, name, f"{name} ({self.columns[1]})", self.notes), label

    def _label(self, value: Any, name: str, num_classes: int) -> NDArray[np.integer]:
        name = f"{name} ({self.columns[1]})"
        if value is None or isinstance(value, dict):
            label = mask_indices(decode_bytes(_content(value, name), name), name)
        else:
            try:
                label = np.asarray(value)
            except ValueError:  # rows of different lengths
                label = np.zeros(0, np.int64)
            if label.ndim != 2 or label.dtype.kind not in "iu":
                raise DataError(f"{name}: not an image, and no array of whole numbers (H, W)")
        if self.reduce_labels:
            return reduced_labels(label, num_classes, name)
        check_labels(label, num_classes, name, hint=REDUCE_HINT)
        return label

    def _count_classes(self, splits: dict[str, Any]) -> int:
        highest = -1
        for split, dataset in splits.items():
            if self.columns[1] not in dataset.column_names:
                continue
            for index, row in enumerate(self._chosen(dataset)):
                name = f"{split}/{index:06}"
                label = self._label(row[self.columns[1]], name, IGNORE_INDEX)
                used = label[label != IGNORE_INDEX]
                highest = max(highest, int(used.max()) if used.size else -1)
        if highest < 0:
            raise DataError(f"{self.root}: no pixel of any label has a class")
        return highest + 1


def open_splits(root: str | Path) -> dict[str, Any]:
    """The datasets in a folder, by their splits.

    Raises:
        DataError: there is no such folder, or nothing in it that can be read.
    """
    library: Any = load("Hugging Face's datasets", "datasets")
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{root}: no such folder")
    try:
        found = library.load_from_disk(str(folder))
    except Exception as error:  # reading damaged files can raise any error
        raise DataError(
            f"{root}: not a folder that save_to_disk wrote ({shorten(error)})"
        ) from error
    if isinstance(found, library.DatasetDict):
        return {str(name): dataset for name, dataset in found.items()}
    return {WHOLE: found}


def _content(value: Any, name: str) -> bytes:
    """The bytes of a stored image; a path in it is not followed, as it may name any file."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    if isinstance(value, dict) and value.get("path"):
        raise DataError(
            f"{name}: stores a path and no image; save the dataset again with save_to_disk, which "
            "copies the images"
        )
    raise DataError(f"{name}: no image")
