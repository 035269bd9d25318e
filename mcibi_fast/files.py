"""Writes files so that a crash leaves the old file or the new one, never half of a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError raised by a write, which Python leaves out."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, syncs it to disk, and renames it.

    Raises:
        OSError: for example, the disk is full; ``path`` is then unchanged and the temporary file is
            removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _write_synced(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_directory_atomically(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes a directory of files under a temporary name, syncs it to disk, and renames it.

    An existing directory of that name is replaced.

    Raises:
        OSError: as in `write_atomically`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, content in files.items():
            _write_synced(temporary / name, content)
        _sync(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A new directory under a temporary name, synced to disk and renamed when the block ends.

    Anything that a killed process left under the temporary name is removed first.

    Raises:
        OSError: for example, the disk is full, or ``path`` exists and is not empty; after this or
            any other error the temporary directory is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        with naming(path):
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)


def link_atomically(link: Path, target: str) -> None:
    """Makes the symbolic link ``link`` point to ``target``, an entry of the same directory."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    os.symlink(target, temporary)
    os.replace(temporary, link)
    _sync(link.parent)


def _write_synced(path: Path, content: bytes) -> None:
    with naming(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
