"""Reads a dataset's files, with limits on their sizes, and checks the names that they give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.errors import DataError
from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.limits import check_limit
from mcibi_fast.untrusted import open_regular, shorten

_LONGEST_PATH, _LONGEST_NAME = 1024, 255  # characters


def read_regular(path: str | Path, name: str, limit: str) -> bytes:
    """A file's content.

    Args:
        path: the file's path.
        name: the file's name in error messages.
        limit: name of the limit on its bytes, see `mcibi_fast.limits`.

    Raises:
        OSError: see `mcibi_fast.untrusted.open_regular`.
        DataError: it is larger than the limit.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        check_limit(limit, size, f"{name}: {size:,} bytes", DataError)
        return file.read(size)


def check_name(name: str, source: str) -> None:
    """Raises DataError for a path, given by the file ``source``, that leads out of the dataset.

    The files of a dataset must not be able to choose other files of the machine.
    """
    shown = repr(name if len(name) <= 80 else f"{name[:80]}...")
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise DataError(
            f"{source}: {shown} leads out of the dataset's folder; nothing is read there"
        )
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise DataError(f"{source}: {shown} cannot be the name of a file") from None
    if "\0" in name or len(name) > _LONGEST_PATH or max(map(len, parts)) > _LONGEST_NAME:
        raise DataError(f"{source}: {shown} cannot be the name of a file")


def check_class_names(names: list[Any], source: str) -> None:
    """Raises DataError for class names that are not text, too long, too few, or too many."""
    if not 1 <= len(names) <= IGNORE_INDEX:
        raise DataError(f"{source}: {len(names):,} classes; 1 to {IGNORE_INDEX} are possible")
    if not all(isinstance(name, str) and len(name) <= _LONGEST_NAME for name in names):
        raise DataError(f"{source}: a name that is no text of up to {_LONGEST_NAME} characters")


def palette_rows(colours: Any, count: int, source: str) -> NDArray[np.uint8]:
    """A palette (K, 3) from lists of numbers.

    Raises DataError unless it has ``count`` colours, each of three whole numbers from 0 to 255.
    """
    if not isinstance(colours, list) or len(colours) != count:
        given = len(colours) if isinstance(colours, list) else 0
        raise DataError(f"{source}: palette of {given} colours, {count} classes")
    for colour in colours:
        if not isinstance(colour, list) or len(colour) != 3 or not all(map(_is_byte, colour)):
            raise DataError(
                f"{source}: palette: {shorten(repr(colour), 40)} is no colour; expected three "
                "whole numbers from 0 to 255"
            )
    return np.array(colours, np.uint8).reshape(-1, 3)


def _is_byte(number: Any) -> bool:
    return type(number) is int and 0 <= number <= 255
