"""Reads zip files in place: with limited sizes, and only paths below their own top."""

from __future__ import annotations

import io
import os
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcibi_fast.data.errors import DataError
from mcibi_fast.data.reading import check_name
from mcibi_fast.limits import check_limit, limit
from mcibi_fast.untrusted import open_regular, shorten

# Any few bytes of the others (bzip2, LZMA) can hold a thousand times more than they announce.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENTRY_BYTES = 128  # of a zip file's directory, for each entry that is allowed


class ZipStore:
    """The files of a zip file, as `Files` asks for them: paths with "/", from its top."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._children: dict[str, set[str]] | None = None
        self._files: set[str] = set()
        self._opened: tuple[int, zipfile.ZipFile] | None = None  # by this process

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def holds(self, path: str) -> bool:
        # If the zip file was never searched, no path was found in it.
        return path in self._files

    def names(self, folder: str) -> set[str]:
        return (self._children or {}).get(folder, set())

    def find(self, part: str) -> str | None:
        children = self._index()
        places = [*children, *self._files] if "." in part else children
        found = [p for p in places if p == part or p.endswith(f"/{part}")]
        # The shallowest: __MACOSX repeats the whole tree one folder down.
        return min(found, key=lambda p: (p.count("/"), p), default=None)

    def read(self, path: str, limit: str) -> bytes:
        return self._read(path, lambda size: size, limit)

    def head(self, path: str, count: int) -> bytes:
        return self._read(path, lambda size: min(size, count))

    def _read(self, path: str, wanted: Callable[[int], int], limit: str | None = None) -> bytes:
        name = f"{self.path.name}/{path}"
        with self._reading(f"{name}: cannot be read", "download the zip file again"):
            archive = self._open()
            member = archive.getinfo(path)
            if member.compress_type not in _COMPRESSIONS:
                raise DataError(f"{name}: is not compressed by deflate; pack the zip file anew")
            if limit is not None:
                check_limit(
                    limit, member.file_size, f"{name}: {member.file_size:,} bytes", DataError
                )
            with archive.open(member) as file:
                # Reading "to the end" would expand more than the announced size and cut that off.
                return file.read(wanted(member.file_size))

    def _open(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _open_zip(self.path))
        return self._opened[1]

    def _index(self) -> dict[str, set[str]]:
        """The content of each folder; also fills the set of files."""
        if self._children is None:
            with self._reading(f"{self.path.name}: not a whole zip file", "download it again"):
                names = self._open().namelist()
            self._files, self._children = _tree(self.path.name, names)
        return self._children

    @contextmanager
    def _reading(self, what: str, cure: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # zipfile raises many kinds of errors
            raise DataError(f"{what} ({shorten(error)}); {cure}") from error


def _open_zip(path: Path) -> zipfile.ZipFile:
    file = _DirectoryReader(open_regular(path).detach())  # type: ignore[attr-defined]
    try:
        archive = zipfile.ZipFile(file)
    except BaseException:
        file.close()
        raise
    file.limited = False
    weakref.finalize(archive, file.close)
    return archive


class _DirectoryReader(io.BufferedReader):
    """Lets `zipfile` read only a directory of limited size, as it creates objects for all of it."""

    limited = True

    def read(self, size: int | None = -1) -> bytes:
        if self.limited and size is not None and size > _ENTRY_BYTES * limit("MAX_ZIP_ENTRIES"):
            entries = size // _ENTRY_BYTES
            check_limit("MAX_ZIP_ENTRIES", entries, f"room for {entries:,} entries", DataError)
        return super().read(size)


def _tree(archive: str, names: list[str]) -> tuple[set[str], dict[str, set[str]]]:
    """The files of a zip file, and the content of each folder. Raises DataError beyond limits."""
    files: set[str] = set()
    children: dict[str, set[str]] = {"": set()}
    levels = max((name.count("/") for name in names), default=0)
    check_limit("MAX_ZIP_LEVELS", levels, f"{archive}: {levels:,} folders in each other", DataError)
    most = limit("MAX_ZIP_ENTRIES")
    for name in names:
        check_name(name, archive)
        if not name.endswith("/"):
            files.add(name)
        parts = name.rstrip("/").split("/")
        for depth, part in enumerate(parts):
            children.setdefault("/".join(parts[:depth]), set()).add(part)
        if name.endswith("/"):
            children.setdefault(name.rstrip("/"), set())
        entries = len(files) + len(children)
        if entries > most:
            check_limit("MAX_ZIP_ENTRIES", entries, f"{archive}: {entries:,} entries", DataError)
    return files, children
