"""Reads ``index.json`` of packed datasets and checks that nothing in it points elsewhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.reading import check_class_names
from mcibi_fast.untrusted import parse_json

INDEX = "index.json"
FORMAT = "mcibi_fast shards 1"

_LONGEST_NAME = 1024  # of a sample, in characters
_LARGEST = (1 << 62) - 1  # two of them can be added in int64


class ShardIndex(NamedTuple):
    """A split: the attributes of a `SegmentationDataset`, and the positions of its samples.

    ``sizes`` are the bytes of each shard. A row of ``rows`` (N, 6) int64 has a sample's shard, the
    start and length of its image, the same for its label, and the checksum of the bytes from the
    image to the label.
    """

    classes: list[str]
    palette: NDArray[np.uint8]
    flip_pairs: tuple[tuple[int, int], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ignore_index: int
    sizes: list[int]
    names: list[str]
    rows: NDArray[np.int64]


def parse_index(content: bytes) -> ShardIndex:
    """Reads an index.

    Raises:
        ValueError: an entry is missing, has the wrong type, or is out of range, such as a sample
            outside its shard; the message names the entry.
    """
    index = _of_type(parse_json(content), dict, "it")
    missing = [key for key in _KEYS if key not in index]
    if missing:
        raise ValueError(f"no {missing[0]}")
    if index["format"] != FORMAT:
        raise ValueError(f"format: expected {FORMAT!r}")
    classes = _of_type(index["classes"], list, "classes")
    check_class_names(classes, "classes")
    palette = _rows(index["palette"], 3, "palette", 255)
    pairs = _rows(index["flip_pairs"], 2, "flip_pairs", len(classes) - 1)
    if len(palette) != len(classes):
        raise ValueError(f"palette: {len(palette)} colours of {len(classes)} classes")
    shards = _of_type(index["shards"], list, "shards")
    shards = [_of_type(shard, dict, "shards") for shard in shards]
    sizes, counts = (
        _whole([shard.get(key) for shard in shards], f"shards.{key}", _LARGEST)
        for key in ("bytes", "samples")
    )
    names, rows = _samples(_of_type(index["samples"], list, "samples"))
    _check_places(rows, sizes, counts)
    return ShardIndex(
        classes,
        palette.astype(np.uint8),
        tuple((left, right) for left, right in pairs.tolist()),
        _three(index["mean"], "mean"),
        _three(index["std"], "std"),
        int(_whole([index["ignore_index"]], "ignore_index", 1 << 31, -(1 << 31))[0]),
        sizes.tolist(),
        names,
        rows,
    )


_KEYS = (
    *("format", "classes", "palette", "flip_pairs", "mean", "std", "ignore_index"),
    *("shards", "samples"),
)


def _samples(entries: list[Any]) -> tuple[list[str], NDArray[np.int64]]:
    names: list[str] = []
    for entry in entries:
        name: str = _of_type(next(iter(_of_type(entry, list, "samples")), None), str, "samples")
        if len(name) > _LONGEST_NAME:
            raise ValueError(f"samples: a name of more than {_LONGEST_NAME} characters")
        names.append(name)
    return names, _rows([entry[1:] for entry in entries], 6, "samples", _LARGEST)


def _check_places(
    rows: NDArray[np.int64], sizes: NDArray[np.int64], counts: NDArray[np.int64]
) -> None:
    shard, image_at, image_size, label_at, label_size, _ = rows.T
    if (shard >= len(sizes)).any():
        raise ValueError(f"samples: one in shard {shard.max()} of {len(sizes)}")
    if not np.array_equal(np.bincount(shard, minlength=len(sizes)), counts):
        raise ValueError("the shards' counts are not those of the samples")
    whole = (image_size > 0) & (label_size > 0) & (label_at + label_size <= sizes[shard])
    if not (whole & (image_at + image_size <= label_at)).all():
        raise ValueError("samples: one that does not lie in its shard, image before label")


def _rows(value: Any, length: int, name: str, most: int) -> NDArray[np.int64]:
    """Lists of ``length`` whole numbers from 0 to ``most``."""
    rows = _of_type(value, list, name)
    if not all(isinstance(row, list) and len(row) == length for row in rows):
        raise ValueError(f"{name}: expected lists of {length} numbers")
    return _whole([number for row in rows for number in row], name, most).reshape(-1, length)


def _whole(numbers: list[Any], name: str, most: int, least: int = 0) -> NDArray[np.int64]:
    if not all(type(number) is int and least <= number <= most for number in numbers):
        raise ValueError(f"{name}: expected whole numbers from {least} to {most}")
    return np.array(numbers, np.int64)


def _three(value: Any, name: str) -> tuple[float, ...]:
    numbers = _of_type(value, list, name)
    if len(numbers) != 3 or not all(type(n) in (int, float) and abs(n) < 1e9 for n in numbers):
        raise ValueError(f"{name}: expected three numbers")
    return tuple(numbers)


def _of_type(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name}: a {type(value).__name__}, expected a {kind.__name__}")
    return value
