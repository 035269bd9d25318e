"""The package's own errors and warning; otherwise it raises ValueError, OSError, ImportError."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# How PyTorch, CUDA, oneDNN, OpenCV and the C++ library say that an allocation failed.
_ALLOCATION = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "not enough memory",
    "insufficient memory",
    "bad_alloc",
    "status_alloc_failed",
)
_AMOUNT = re.compile(r"(?:tried|unable) to allocate ([\d.]+ \w+)", re.IGNORECASE)
_LONGEST_REASON = 120  # characters


class TrainingError(RuntimeError):
    """Training cannot continue; the message is one line that says at which step and why."""


class WeightsError(RuntimeError):
    """Weights that are not to be had; the message is one line that says which, and what to do."""


class DataWarning(UserWarning):
    """Data that can be used, but not all of it, or perhaps not as its owner expects."""


class TooLittleMemoryError(MemoryError):
    """An allocation failed; the message is one line that says for what, and what to do."""


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Raises TooLittleMemoryError for every error that a failed allocation causes.

    Args:
        what: what needs the memory, such as an image's name.
        advice: what to do.
    """
    try:
        yield
    except TooLittleMemoryError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TooLittleMemoryError(f"{what}: {memory_line(error)}; {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a failed allocation caused the error, on the CPU or on a GPU."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError) and type(error).__module__ != "cv2":
        return False
    text = str(error).lower()
    return any(words in text for words in _ALLOCATION)


def is_killed_worker(error: BaseException) -> bool:
    """Whether a process that loads data ended early; PyTorch may say so anywhere."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def explanation(error: BaseException) -> str | None:
    """One line for an error of PyTorch's that is no fault of the program; None for others."""
    if is_killed_worker(error):
        return killed_worker_line(error)
    if is_out_of_memory(error):
        if isinstance(error, TooLittleMemoryError):
            return str(error)
        return f"{memory_line(error)}; use smaller batches, crops or windows (--window)"
    return None


def killed_worker_line(error: BaseException) -> str:
    """That a process that loads data ended early, what the error says of it, and what to do."""
    reason = " ".join(str(error).split()).rstrip(".")
    return (
        f"a process that loads data ended early ({reason[:_LONGEST_REASON]}), usually because "
        "the memory, or /dev/shm, is full; use fewer processes (--workers; --set workers=N in "
        "training), or smaller batches"
    )


def memory_line(error: BaseException) -> str:
    """ "not enough memory", and what the error says of it."""
    reason = " ".join(str(error).split())
    amount = _AMOUNT.search(reason)
    if amount:
        reason = f"tried to allocate {amount[1]}"
    if len(reason) > _LONGEST_REASON:
        reason = reason[:_LONGEST_REASON] + "..."
    return f"not enough memory ({reason})" if reason else "not enough memory"


def and_more(count: int) -> str:
    """What follows the first of ``count`` things in a message, such as " (and 2 more)"."""
    return f" (and {count - 1} more)" if count > 1 else ""


def did_you_mean(name: str, known: Sequence[str], shown: Sequence[str] | None = None) -> str:
    """The known name nearest to an unknown one, or all; ``shown`` if not all are to be listed."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(shown or known)}"
