"""Reads a dataset's files from a folder, a zip file, or a folder that holds its zip files.

A zip file is read in place. Its directory is read once; each process opens the file for itself when
it first reads from it, so a `Files` may be handed to a data loader's workers.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

from mcibi_fast.data.errors import DataError

_SEARCH_DEPTH = 2  # folders between the root and what is looked for
_READING_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,  # encrypted
    NotImplementedError,  # an unknown compression
    zipfile.BadZipFile,
    zlib.error,
)


class Files:
    """The files under ``root``; those of a folder and of the zip files in it are one tree.

    Args:
        root: a folder or a zip file.
        layout: what should be in it, in words, for the errors.

    Paths are texts with "/", relative to the root or to the top of a zip file. Raises DataError
    when ``root`` is neither, or is an incomplete zip file.
    """

    def __init__(self, root: str | Path, layout: str = "the dataset") -> None:
        self.root, self.layout = Path(root), layout
        self._stores: list[_Folder | _Zip]
        if self.root.is_dir():
            archives = sorted(p for p in self.root.iterdir() if p.suffix.lower() == ".zip")
            self._stores = [_Folder(self.root), *(_Zip(path) for path in archives)]
        elif self.root.is_file():
            self._stores = [_Zip(self.root)]
            self._stores[0].find("")
        else:
            raise DataError(f"{root}: no such folder or zip file; expected {layout}")

    def find(self, *parts: str) -> str | None:
        """The path that ends in the first of ``parts`` that exists; None if none does.

        It may be at the top or up to two folders below, as in the downloaded archive. An incomplete
        zip file raises a DataError only if nothing is found elsewhere.
        """
        broken: DataError | None = None
        for part in parts:
            for store in self._stores:
                try:
                    found = store.find(part)
                except DataError as error:
                    broken = broken or error
                    continue
                if found is not None:
                    return found
        if broken is not None:
            raise broken
        return None

    def locate(self, *parts: str) -> str:
        """As `find`, but raises DataError when nothing is there."""
        found = self.find(*parts)
        if found is None:
            raise DataError(f"{self.root}: no {parts[-1]} in it; expected {self.layout}")
        return found

    def names(self, folder: str) -> list[str]:
        """What lies directly in ``folder``, sorted, hidden files left out."""
        found: set[str] = set()
        for store in self._stores:
            found.update(store.names(folder))
        return sorted(name for name in found if not name.startswith("."))

    def read(self, path: str) -> bytes:
        """A file's content. Raises DataError when it is missing or cannot be read."""
        store = self._store(path)
        if store is None:
            raise DataError(f"{path}: missing; expected {self.layout}")
        return store.read(path)

    def head(self, path: str, count: int) -> bytes:
        """The first ``count`` bytes of a file, fewer where it is shorter. Raises as `read` does."""
        store = self._store(path)
        if store is None:
            raise DataError(f"{path}: missing; expected {self.layout}")
        return store.read(path, count)

    def lines(self, path: str) -> list[str]:
        """A text file's lines that are not blank, stripped. Raises DataError if there are none."""
        try:
            text = self.read(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.describe(path)}: not a text file; replace it") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise DataError(f"{self.describe(path)}: lists nothing; replace it")
        return lines

    def describe(self, path: str) -> str:
        """The path as errors name it: with the zip file that holds it."""
        store = self._store(path)
        return f"{store.path.name}/{path}" if isinstance(store, _Zip) else path

    def _store(self, path: str) -> _Folder | _Zip | None:
        return next((store for store in self._stores if store.holds(path)), None)


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def holds(self, path: str) -> bool:
        return (self.path / path).is_file()

    def names(self, folder: str) -> list[str]:
        place = self.path / folder
        return os.listdir(place) if place.is_dir() else []

    def read(self, path: str, count: int = -1) -> bytes:
        try:
            with (self.path / path).open("rb") as file:
                return file.read(count)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error

    def find(self, part: str) -> str | None:
        level = [self.path]
        for _ in range(_SEARCH_DEPTH + 1):
            for folder in level:
                if (folder / part).exists():
                    return (folder / part).relative_to(self.path).as_posix()
            level = [Path(e) for folder in level for e in sorted(_folders(folder))]
        return None


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.is_dir()]
    except PermissionError:  # someone else's folder beside the dataset
        return []


class _Zip:
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

    def read(self, path: str, count: int = -1) -> bytes:
        try:
            with self._open().open(path) as file:
                return file.read(count)
        except _READING_ERRORS as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{self.path.name}/{path}: cannot be read ({reason}); download the zip file again"
            ) from error

    def _open(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self._opened[1]

    def _index(self) -> dict[str, set[str]]:
        """The content of each folder; also fills the set of files."""
        if self._children is not None:
            return self._children
        try:
            names = self._open().namelist()
        except _READING_ERRORS as error:
            raise DataError(
                f"{self.path.name}: not a whole zip file ({error}); download it again"
            ) from error
        children: dict[str, set[str]] = {"": set()}
        for name in names:
            if not name.endswith("/"):
                self._files.add(name)
            parts = name.rstrip("/").split("/")
            for depth, part in enumerate(parts):
                children.setdefault("/".join(parts[:depth]), set()).add(part)
            if name.endswith("/"):
                children.setdefault(name.rstrip("/"), set())
        self._children = children
        return children
