"""What readers note about files that can be used, but perhaps not as their owner expects."""

from __future__ import annotations

import torch

from mcibi_fast.terminal import warn

KINDS = ("bands", "frames", "turned", "not turned", "unlabelled")


class Notes:
    """Counts the files that a note of each kind is about, and says the first of each kind.

    Args:
        aloud: say it with a warning (`terminal.warn`); in any case `lines` has it, with the number
            of files.
    """

    def __init__(self, *, aloud: bool = True) -> None:
        self.aloud = aloud
        # Shared memory: a data loader's workers say a kind once between them, in all epochs.
        self._counts = torch.zeros(len(KINDS), dtype=torch.int64).share_memory_()
        self._first: dict[str, str] = {}

    def add(self, kind: str, text: str) -> None:
        """Notes ``text``, which begins with the file's name; ``kind`` is one of `KINDS`."""
        is_first = not self.files(kind)
        self._counts[KINDS.index(kind)] += 1
        if not is_first:
            return
        self._first[kind] = text
        if self.aloud:
            warn(f"{text} (said once)")

    def files(self, kind: str) -> int:
        """How many files a kind of note is about; one that is read twice counts twice."""
        return int(self._counts[KINDS.index(kind)])

    def lines(self) -> list[str]:
        """A line for each kind, of its first file; none of those that a worker has read."""
        return [
            text + (f" (and {more:,} more)" if (more := self.files(kind) - 1) else "")
            for kind, text in self._first.items()
        ]
