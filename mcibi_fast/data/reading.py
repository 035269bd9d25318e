"""Reads a dataset's files, with limits on their sizes, and checks the names that they give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mcibi_fast.data.errors import DataError
from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.limits import check_limit
from mcibi_fast.untrusted import open_regular

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
    if "\0" in name or len(name) > _LONGEST_PATH or max(map(len, parts)) > _LONGEST_NAME:
        raise DataError(f"{source}: {shown} cannot be the name of a file")


def check_class_names(names: list[Any], source: str) -> None:
    """Raises DataError for class names that are not text, too long, too few, or too many."""
    if not 1 <= len(names) <= IGNORE_INDEX:
        raise DataError(f"{source}: {len(names):,} classes; 1 to {IGNORE_INDEX} are possible")
    if not all(isinstance(name, str) and len(name) <= _LONGEST_NAME for name in names):
        raise DataError(f"{source}: a name that is no text of up to {_LONGEST_NAME} characters")
