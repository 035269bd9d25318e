"""Writes files so that a crash leaves the old file or the new one, never half of a file.

Everything is written under a random temporary name, to a file or folder that this process created,
and then renamed: no symbolic link is ever followed, and a link in the place of a result is
replaced. Permissions follow the umask, as with ``open``.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\.mcibi_fast-[0-9a-f]{16}\.tmp")
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError raised by a write, which Python leaves out."""
    try:
        yield
    except OSError as error:
        named = error.filename is not None and not _TEMPORARY.fullmatch(Path(error.filename).name)
        if named:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """As `write_atomically`, in UTF-8; what it cannot encode, such as a part of a name that is no
    UTF-8, becomes an escape.
    """
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, syncs it to disk, and renames it.

    Raises:
        OSError: for example, the disk is full; ``path`` is then unchanged and the temporary file is
            removed.
    """
    with new_file(path) as file:
        file.write(content)


@contextmanager
def new_file(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A new file under a temporary name, renamed when the block ends.

    Args:
        path: its final name; a file or link with that name is replaced.
        sync: sync the file to disk before it is renamed.

    Raises:
        OSError: as in `write_atomically`; after this or any other error the temporary file is
            removed.
    """
    with naming(path):
        temporary, descriptor = _claim(path, lambda name: os.open(name, _NEW, 0o666))
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(descriptor)
            os.replace(temporary, path)  # while its lock is held
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        _sync(path.parent)


def open_new(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Opens a new file for writing; nothing with that name may exist, not even a link."""
    return os.fdopen(os.open(path, _NEW, 0o666), "wb", buffering=buffering)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file, which is created if needed; a link is refused.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with naming(path), os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        file.write(f"{line}\n".encode("utf-8", "backslashreplace"))


def make_folder(path: Path, *, below: Path) -> None:
    """Creates a folder and the folders above it.

    Args:
        path: the folder.
        below: a folder above it that the user named. It may be reached through links, whereas links
            below it are replaced by folders.
    """
    below.mkdir(parents=True, exist_ok=True)
    for part in reversed([path, *path.parents[: len(path.relative_to(below).parts)]][:-1]):
        if part.is_symlink():
            part.unlink()
        part.mkdir(exist_ok=True)


def write_directory_atomically(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes a directory of files under a temporary name, syncs it to disk, and renames it.

    An existing directory of that name, or a link, is replaced.

    Raises:
        OSError: as in `write_atomically`.
    """
    with _temporary_directory(path) as temporary:
        for name, content in files.items():
            _write_synced(temporary / name, content)
        _sync(temporary)
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
    _sync(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A new directory under a temporary name, synced to disk and renamed when the block ends.

    Raises:
        OSError: for example, the disk is full, or ``path`` exists and is not empty; after this or
            any other error the temporary directory is removed.
    """
    with _temporary_directory(path) as temporary:
        yield temporary
        with naming(path):
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
        os.rename(temporary, path)
    _sync(path.parent)


@contextmanager
def private_file(path: Path) -> Iterator[Path]:
    """A temporary path for a library that opens files by name; renamed when the block ends.

    It is in a new directory that only this user can enter, so that nobody else can put a link
    there.

    Args:
        path: path of the result; the temporary file has the same name.

    Raises:
        OSError: it cannot be written; after this or any other error the temporary file is removed.
    """
    with _temporary_directory(path, mode=0o700) as temporary:
        yield temporary / path.name
        if (temporary / path.name).exists():
            os.replace(temporary / path.name, path)
        temporary.rmdir()


def link_atomically(link: Path, target: str) -> None:
    """Makes the symbolic link ``link`` point to ``target``, an entry of the same directory."""
    temporary = _temporary(link)
    os.symlink(target, temporary)
    try:
        os.replace(temporary, link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(link.parent)


@contextmanager
def _temporary_directory(path: Path, *, mode: int = 0o777) -> Iterator[Path]:
    """A temporary directory beside ``path``; it is removed after an error."""

    def make(name: Path) -> int | None:
        name.mkdir(mode=mode)
        with suppress(FileNotFoundError):
            return os.open(name, _LOOK)
        return None

    with naming(path):
        temporary, descriptor = _claim(path, make)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _claim(path: Path, make: Callable[[Path], int | None]) -> tuple[Path, int]:
    """Creates and opens a temporary file or directory; it is locked while the descriptor is open.

    Before it is locked, another process may remove it as a leftover; then another one is created.
    """
    while True:
        temporary = _temporary(path)
        descriptor = make(temporary)
        if descriptor is None:
            continue
        with suppress(OSError):  # some file systems know no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """A new name beside ``path``. Leftovers of killed processes are removed first."""
    _remove_leftovers(path.parent)
    return path.parent / f".mcibi_fast-{secrets.token_hex(8)}.tmp"


@functools.cache  # once per folder and process: a folder may hold a hundred thousand label maps
def _remove_leftovers(folder: Path) -> None:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _TEMPORARY.fullmatch(entry.name)]
    for name in names:
        with suppress(OSError):  # in use, a link, gone already, or someone else's
            descriptor = os.open(folder / name, _LOOK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    shutil.rmtree(folder / name)
                else:
                    (folder / name).unlink()
            finally:
                os.close(descriptor)


def _write_synced(path: Path, content: bytes) -> None:
    with naming(path), open_new(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
