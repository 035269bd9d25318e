"""Progress of long work: a bar on a terminal, elsewhere a line from time to time.

A log file or a CI job gets lines such as ``epoch 3/20: step 120 of 360, loss 0.8123, 0.52 steps per
second, 7 min left``, at most one in `SECONDS_BETWEEN_LINES`. Both go to stderr. Work that takes
less time than that prints none.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from mcibi_fast import extras
from mcibi_fast.terminal import printable, say

SECONDS_BETWEEN_LINES = 30.0
"""Shortest time between two lines, and from the beginning of the work to the first one."""

T = TypeVar("T")


class Progress:
    """Counts the units of some work and shows how far it is; use it in a ``with`` statement.

    Work within other work (the evaluation during a training) shares the time between lines with it.

    Args:
        title: what is being done.
        unit: what is counted, in the singular: "image", "step".
        total: how many there are; None if that is not known.
        done: how many were done earlier.
        show: False shows nothing.
        leave: keep the bar on the terminal when the work is done.
    """

    _open: ClassVar[list[Progress]] = []  # those that print lines, outermost first
    _last_line = 0.0  # when the last of these lines was printed, or the outermost work began

    def __init__(
        self,
        title: str,
        *,
        unit: str,
        total: int | None = None,
        done: int = 0,
        show: bool = True,
        leave: bool = False,
    ) -> None:
        self.title, self.unit, self.total, self.done = printable(title), unit, total, done
        self.note = ""
        self._show, self._leave = show, leave
        self._bar: Any = None
        self._prints = False
        self._first = self._counted = (0.0, done)  # when the work, and the last line's, began

    def __enter__(self) -> Progress:
        self._first = self._counted = (_now(), self.done)
        self._prints = self._show and not sys.stderr.isatty()
        if self._show and not self._prints:
            self._bar = extras.load("a progress bar", "tqdm").tqdm(
                desc=self.title,
                unit=self.unit,
                total=self.total,
                initial=self.done,
                leave=self._leave,
            )
        if self._prints:
            if not self._open:
                Progress._last_line = _now()
            self._open.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._prints:
            self._open.remove(self)
            self._prints = False
        if self._bar is not None:
            self._bar.close()

    def rename(self, title: str) -> None:
        """Shows another title from now on."""
        self.title = printable(title)
        if self._bar is not None:
            self._bar.set_description(self.title, refresh=False)

    def is_due(self) -> bool:
        """Whether `advance` will print a line now, so that a note is worth its making."""
        return self._prints and _now() - self._last_line >= SECONDS_BETWEEN_LINES

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Counts units that were done.

        Args:
            count: how many.
            note: is shown from now on, such as "loss 0.8123".
        """
        self.done += count
        if note is not None:
            self.note = note
        if self._bar is not None:
            if note is not None:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self.is_due():
            Progress._last_line = _now()
            say(self._line(), file=sys.stderr)

    def _line(self) -> str:
        """How far it is, the rate since the last line, and the time left at the average rate."""
        now = _now()
        (start, at_start), (last, at_last) = self._first, self._counted
        self._counted = now, self.done
        count = f"{self.done}" if self.total is None else f"{self.done} of {self.total}"
        parts = [f"{self.unit} {count}", self.note]
        if now > last:
            parts.append(f"{(self.done - at_last) / (now - last):.3g} {self.unit}s per second")
        if self.total is not None and self.done > at_start:
            left = (self.total - self.done) * (now - start) / (self.done - at_start)
            parts.append(f"{duration(left)} left")
        return f"{self.title}: {', '.join(filter(None, parts))}"


def track(
    items: Iterable[T],
    title: str,
    *,
    unit: str,
    total: int | None = None,
    show: bool = True,
    leave: bool = False,
) -> Iterator[T]:
    """Goes over items and shows how far it is; for the arguments see `Progress`.

    Args:
        items: what is gone over; their number is the total if they have one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(title, unit=unit, total=total, show=show, leave=leave) as progress:
        for item in items:
            yield item
            progress.advance()


def aside() -> AbstractContextManager[Any]:
    """A context in which one may print while bars are shown; they come back below the text."""
    bars = sys.modules.get("tqdm")
    return nullcontext() if bars is None else bars.tqdm.external_write_mode()


def beside(report: Callable[[str], None]) -> Callable[[str], None]:
    """A function that reports a line while bars are shown."""

    def report_aside(line: str) -> None:
        with aside():
            report(line)

    return report_aside


def duration(seconds: float) -> str:
    """A time in words: "48 s", "7 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _now() -> float:
    return time.perf_counter()
