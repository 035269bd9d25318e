"""From the numbers that a mask holds to classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.errors import DataError
from mcibi_fast.defaults import IGNORE_INDEX

REDUCE_HINT = (
    "if 0 means not labelled and 1 is the first class: data.reduce_labels=true "
    "(--set data.reduce_labels=true with train; --reduce-labels with data check, data pack and "
    "evaluate)"
)
# 0 -> 255, 1 -> 0, ..., 254 -> 253, 255 -> 255
_REDUCED = np.array([IGNORE_INDEX, *range(IGNORE_INDEX - 1), IGNORE_INDEX], np.uint8)


def binary_classes(indices: NDArray[np.integer], name: str) -> NDArray[np.uint8]:
    """A mask of 0 and one other value, 1 or 255, which becomes 1. Raises DataError for others."""
    top = indices.max()
    if top not in (0, 1, 255) or not ((indices == 0) | (indices == top)).all():
        values = np.unique(indices)
        shown = ", ".join(map(str, values[:5])) + (", ..." if values.size > 5 else "")
        raise DataError(f"{name}: not a binary mask of 0 and 255, or of 0 and 1: holds {shown}")
    return (indices > 0).astype(np.uint8)


def reduced_labels(indices: NDArray[np.integer], num_classes: int, name: str) -> NDArray[np.uint8]:
    """A mask of 1..K as one of 0..K-1: 0 is ignored, 255 stays so, the others are one class lower.

    Raises DataError that names another label in the mask ``name``, as it is there.
    """
    bad = ((indices < 0) | (indices > num_classes)) & (indices != IGNORE_INDEX)
    if bad.any():
        raise DataError(
            f"{name}: label {indices[bad][0]} with {num_classes} classes; use "
            f"1..{min(num_classes, IGNORE_INDEX - 1)}, or 0 or {IGNORE_INDEX} for pixels to ignore"
        )
    return _REDUCED[indices]


def check_labels(
    indices: NDArray[np.integer],
    num_classes: int,
    name: str,
    ignore_index: int = IGNORE_INDEX,
    *,
    hint: str = "",
) -> None:
    """Raises DataError when the mask ``name`` holds an index that is no class and not ignored.

    The message ends with the ``hint`` if the only such index is the number of classes, as in a mask
    that counts them from 1.
    """
    bad = ((indices < 0) | (indices >= num_classes)) & (indices != ignore_index)
    if bad.any():
        wrong = indices[bad]
        more = f"; {hint}" if hint and (wrong == num_classes).all() else ""
        raise DataError(
            f"{name}: label {wrong[0]} with {num_classes} classes; "
            f"use 0..{num_classes - 1}, or {ignore_index} for pixels to ignore{more}"
        )
