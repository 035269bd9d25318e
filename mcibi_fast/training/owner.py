"""One training per directory: the process that trains there holds a lock."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mcibi_fast.files import naming

LOCK = "lock"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_held: set[int] = set()


def _forget() -> None:
    # A loader process that outlives its killed parent must not keep the lock.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def owned(folder: Path, report: Callable[[str], None] = print) -> Iterator[None]:
    """Holds a run's directory, which is created if needed, for this process.

    The kernel releases the lock of a process that dies. A directory that is still empty at the end
    is removed again.

    Args:
        folder: the directory.
        report: takes a line where the file system knows no locks; nothing is then held.

    Raises:
        ValueError: another process (or another training of this one) holds it.
        OSError: the directory cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    with naming(file):
        descriptor = _claim(file, report)
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        with suppress(OSError):
            file.unlink()  # before the lock is released, so that nobody waits for a removed file
        os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()


def _claim(file: Path, report: Callable[[str], None]) -> int:
    """The lock file's descriptor, locked."""
    while True:
        descriptor = os.open(file, _FLAGS, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 100).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise ValueError(
                f"out: {file.parent} is in use by the training of {owner}; wait for it, stop it, "
                "or choose another directory"
            ) from None
        except OSError as error:
            report(
                f"warning: {file.parent} cannot be locked ({error.strerror}): make sure that no "
                "other training writes there"
            )
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                break
        os.close(descriptor)  # its owner has just removed it
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor
