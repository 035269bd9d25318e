"""Reading files from elsewhere: regular ones only, of limited sizes, and the names they give."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from mcibi_fast.data.errors import DataError
from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.limits import check_limit

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_LONGEST_PATH, _LONGEST_NAME = 1024, 255  # characters


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file to read.

    Raises OSError as `open` does, and for what is no regular file: a FIFO may never be written to,
    a device never end. Links are followed.
    """
    _check_regular(os.stat(path), path)
    # It may have been exchanged meanwhile; so that opening a FIFO does not wait either.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_regular(os.fstat(descriptor), path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, name: str, limit: str) -> bytes:
    """A file's content.

    Args:
        path: where it lies.
        name: what the error calls it.
        limit: the name of the limit on its bytes, see `mcibi_fast.limits`.

    Raises:
        OSError: see `open_regular`.
        DataError: it is larger than the limit.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        check_limit(limit, size, f"{name}: {size:,} bytes", DataError)
        return file.read(size)


def parse_json(content: bytes | str) -> Any:
    """What a JSON text says. Raises ValueError for whatever is wrong with it."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_name(name: str, source: str) -> None:
    """Raises DataError for a path, given by the file ``source``, that leads out of the dataset.

    Where it would lead is nothing that the dataset's files may choose.
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
    """Raises DataError for names of classes that are no texts, too long, too few, or too many."""
    if not 1 <= len(names) <= IGNORE_INDEX:
        raise DataError(f"{source}: {len(names):,} classes; 1 to {IGNORE_INDEX} are possible")
    if not all(isinstance(name, str) and len(name) <= _LONGEST_NAME for name in names):
        raise DataError(f"{source}: a name that is no text of up to {_LONGEST_NAME} characters")


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))
