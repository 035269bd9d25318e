"""Makes Ctrl-C wait for the end of a training step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag; another one over a second later interrupts at once.

    A step that was interrupted halfway (memory updated, weights not) could not be continued
    exactly. Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun.

    Yields:
        A function that returns whether Ctrl-C was pressed.

    Raises:
        KeyboardInterrupt: at the end, if Ctrl-C was pressed and the body raised no error.
    """
    first: float | None = None

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: first is not None
    finally:
        signal.signal(signal.SIGINT, before)
    if first is not None:
        raise KeyboardInterrupt
