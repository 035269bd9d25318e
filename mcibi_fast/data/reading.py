"""Reads files from elsewhere: only regular files of limited size; checks the names in them."""

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
_LONGEST_REASON = 200  # characters
_LONGEST_PATH, _LONGEST_NAME = 1024, 255  # characters


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file to read.

    Raises OSError as `open` does, and also for anything but a regular file: opening a FIFO can wait
    forever, and a device may never end. Links are followed.
    """
    _check_regular(os.stat(path), path)
    # The file may have been exchanged since the check, so opening must not wait for a FIFO either.
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
        path: the file's path.
        name: the file's name in error messages.
        limit: name of the limit on its bytes, see `mcibi_fast.limits`.

    Raises:
        OSError: see `open_regular`.
        DataError: it is larger than the limit.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        check_limit(limit, size, f"{name}: {size:,} bytes", DataError)
        return file.read(size)


def parse_json(content: bytes | str) -> Any:
    """The content of a JSON text. Raises ValueError if anything is wrong with it."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def shorten(error: Exception | str) -> str:
    """What an error says in one line, which is not long: it may quote the file."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


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


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))
