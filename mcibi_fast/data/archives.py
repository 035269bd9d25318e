"""Reads a dataset's files from a folder, a zip file, or a folder that holds its zip files.

A zip file is read in place. Its directory is read once; each process opens the file for itself when
it first reads from it, so a `Files` may be handed to a data loader's workers.

Paths that come from the dataset's own lists stay below its root. Symbolic links in a folder are
followed wherever they lead, because the owner of the folder put them there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcibi_fast.data.errors import DataError
from mcibi_fast.data.reading import check_name, read_regular
from mcibi_fast.data.zips import ZipStore
from mcibi_fast.limits import check_limit
from mcibi_fast.untrusted import decode_text, open_regular

_SEARCH_DEPTH = 2  # folders between the root and what is looked for


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
        self._stores: list[_Folder | ZipStore]
        if self.root.is_dir():
            archives = sorted(p for p in self.root.iterdir() if p.suffix.lower() == ".zip")
            self._stores = [_Folder(self.root), *(ZipStore(path) for path in archives)]
        elif self.root.is_file():
            self._stores = [ZipStore(self.root)]
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
        check_name(folder, str(self.root))
        found: set[str] = set()
        for store in self._stores:
            found.update(store.names(folder))
        return sorted(name for name in found if not name.startswith("."))

    def read(self, path: str, limit: str = "MAX_FILE_BYTES") -> bytes:
        """A file's content.

        Raises DataError when it is missing, cannot be read, or exceeds the limit of that name.
        """
        return self._holder(path).read(path, limit)

    def head(self, path: str, count: int) -> bytes:
        """The first ``count`` bytes of a file, fewer where it is shorter. Raises as `read` does."""
        return self._holder(path).head(path, count)

    def lines(self, path: str) -> list[str]:
        """The names that a text file lists: its lines that are not blank, stripped.

        Raises DataError if there are none, and for a name that leads out of the dataset's folder.
        """
        content, source = self.read(path, "MAX_TEXT_BYTES"), self.describe(path)
        try:
            text = decode_text(content)
        except ValueError as error:
            raise DataError(f"{source}: {error}") from error
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if not names:
            raise DataError(f"{source}: lists nothing; replace it")
        check_limit("MAX_NAMES", len(names), f"{source}: {len(names):,} names", DataError)
        for name in names:
            check_name(name, source)
        return names

    def describe(self, path: str) -> str:
        """The path as errors name it: with the zip file that holds it."""
        store = self._store(path)
        return f"{store.path.name}/{path}" if isinstance(store, ZipStore) else path

    def _store(self, path: str) -> _Folder | ZipStore | None:
        check_name(path, str(self.root))
        return next((store for store in self._stores if store.holds(path)), None)

    def _holder(self, path: str) -> _Folder | ZipStore:
        store = self._store(path)
        if store is None:
            raise DataError(f"{path}: missing; expected {self.layout}")
        return store


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def holds(self, path: str) -> bool:
        return (self.path / path).exists()

    def names(self, folder: str) -> list[str]:
        place = self.path / folder
        return os.listdir(place) if place.is_dir() else []

    def read(self, path: str, limit: str) -> bytes:
        with self._naming(path):
            return read_regular(self.path / path, path, limit)

    def head(self, path: str, count: int) -> bytes:
        with self._naming(path), open_regular(self.path / path) as file:
            return file.read(count)

    @contextmanager
    def _naming(self, path: str) -> Iterator[None]:
        try:
            yield
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
