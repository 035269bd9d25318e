"""A fuzz of the readers: small files of every kind, damaged, in bounded time and memory.

    python -m tests.security.fuzz --seconds 600        # make fuzz
    python -m tests.security.fuzz --kinds png,zip --seed 3 --keep DIR

A reader may return, or raise an error that is named: of one of its kind's classes, in one line.
Anything else, a process that dies, a reader that takes long or fills its memory is a failure: the
file that caused it is kept, and the exit status is 1. The same seed makes the same files.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mcibi_fast.data import DataError
from tests.security.forked import limit_memory
from tests.security.mutations import mutate

MEGABYTES = 256  # that a reader may take beyond what the process has
SECONDS = 10  # for one file
BATCH = 200  # files that one process reads

# So low that what they allow fits into the memory; a kind's seeds are far smaller.
LIMITS = {
    "MAX_PIXELS": 1 << 20,
    "MAX_FILE_BYTES": 1 << 24,
    "MAX_TEXT_BYTES": 1 << 20,
    "MAX_NAMES": 1 << 14,
    "MAX_ANNOTATION_BYTES": 1 << 20,
    "MAX_MAT_BYTES": 1 << 24,
    "MAX_ZIP_ENTRIES": 1 << 14,
    "MAX_HISTORY_BYTES": 1 << 20,
    "MAX_ENTRIES": 1 << 14,
}


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        seeds: good files of it.
        read: reads the content of a damaged one; may write into the folder, which is empty.
        repair: makes checksums right, so that the damage reaches what lies behind them.
        errors: the classes of what it may raise; their subclasses are something else.
    """

    seeds: Callable[[], Sequence[bytes]]
    read: Callable[[bytes, Path], object]
    repair: Callable[[bytes], bytes] = bytes
    errors: tuple[type[Exception], ...] = (DataError, OSError)


class Failure(NamedTuple):
    """A file on which a reader fails in a way that it must not."""

    kind: str
    number: int
    reason: str

    def keep(self, kinds: Mapping[str, Kind], seed: int, folder: Path) -> Path:
        """Writes the file; its path."""
        folder.mkdir(exist_ok=True)
        path = folder / f"{self.kind}-{seed}-{self.number}"
        path.write_bytes(damaged(self.kind, kinds[self.kind], seed, self.number))
        return path


def damaged(name: str, kind: Kind, seed: int, number: int) -> bytes:
    """File ``number`` of a kind: always the same one."""
    rng = random.Random(f"{seed} {name} {number}")
    seeds = kind.seeds()
    content = mutate(rng.choice(seeds), rng, seeds)
    return kind.repair(content) if rng.random() < 0.7 else content


def fuzz(
    kinds: Mapping[str, Kind],
    *,
    seed: int = 0,
    files: int | None = None,
    seconds: float = 1e9,
    log: Callable[[str], None] = print,
) -> list[Failure]:
    """Reads damaged files, each kind in turn, until there are enough or time is over.

    Args:
        kinds: what is read.
        seed: of the damage.
        files: of each kind.
        seconds: of all.
        log: is called with one line about each kind at the end.
    """
    failures: list[Failure] = []
    end, start = time.monotonic() + seconds, 0
    counts = dict.fromkeys(kinds, 0)
    while time.monotonic() < end and (files is None or start < files):
        stop = start + BATCH if files is None else min(start + BATCH, files)
        for name, kind in kinds.items():
            if time.monotonic() < end:
                failures += _read_batch(name, kind, seed, range(start, stop), end)
                counts[name] = stop
        start = stop
    for name, count in counts.items():
        found = sum(failure.kind == name for failure in failures)
        log(f"{name:16} {count:8,} files, {found} failures")
    return failures


def _read_batch(name: str, kind: Kind, seed: int, numbers: range, end: float) -> list[Failure]:
    """Reads some files in processes of their own: a new one after each failure."""
    fork = multiprocessing.get_context("fork")
    failures: list[Failure] = []
    next_number = numbers.start
    while next_number < numbers.stop and time.monotonic() < end:
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(
            target=_work, args=(sender, name, kind, seed, range(next_number, numbers.stop))
        )
        process.start()
        sender.close()
        reason = ""
        try:
            while not reason and next_number < numbers.stop:
                if not receiver.poll(SECONDS):
                    reason = f"takes longer than {SECONDS} seconds"
                else:
                    reason = receiver.recv()
                    next_number += not reason
        except EOFError:
            process.join()
            reason = f"the process died with {process.exitcode}"
        finally:
            process.kill()
            process.join()
            receiver.close()
        if reason:
            failures.append(Failure(name, next_number, reason))
            next_number += 1
    return failures


def _work(sender: Any, name: str, kind: Kind, seed: int, numbers: range) -> None:
    """Reads files and sends, for each, why it failed, or nothing."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_memory(MEGABYTES)
    os.environ.update({f"MCIBI_FAST_{limit}": str(value) for limit, value in LIMITS.items()})
    warnings.simplefilter("ignore")
    with (
        tempfile.TemporaryDirectory() as top,
        open(os.devnull, "w") as nowhere,
    ):
        for stream in (1, 2):  # not only Python's: libtiff prints as well
            os.dup2(nowhere.fileno(), stream)
        for number in numbers:
            folder = Path(top) / str(number)
            folder.mkdir()
            sender.send(_failure(kind, damaged(name, kind, seed, number), folder))
    os._exit(0)


def _failure(kind: Kind, content: bytes, folder: Path) -> str:
    """Why a reader fails the fuzz on this file, or "" if it does not."""
    try:
        kind.read(content, folder)
    except MemoryError:
        return f"takes more than {MEGABYTES} MB"
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError):
                return f"takes more than {MEGABYTES} MB, and says: {error}"
            cause = cause.__cause__ or cause.__context__
        if type(error) not in kind.errors and not isinstance(error, OSError):
            place = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {error} (in {place.filename}, line {place.lineno})"
        text = str(error)
        if not text or "\n" in text or len(text) > 2000:
            return f"{type(error).__name__} of {len(text)} characters, not one line: {text[:200]!r}"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    from tests.security.kinds import KINDS

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kinds", help=f"some of {','.join(KINDS)} (default: all)")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), metavar="DIR")
    args = parser.parse_args(argv)
    kinds = KINDS if args.kinds is None else {name: KINDS[name] for name in args.kinds.split(",")}
    print(f"seed {args.seed}")
    failures = fuzz(kinds, seed=args.seed, seconds=args.seconds)
    for failure in failures[:20]:
        path = failure.keep(kinds, args.seed, args.keep)
        print(f"{path}: {failure.reason}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
