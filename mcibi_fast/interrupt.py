"""Ends a command on Ctrl-C, SIGTERM (Slurm, ``docker stop``) or a closed terminal, all alike."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does."""
    with _handler(signal.default_int_handler):
        yield


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Delays these signals; processes started meanwhile begin without them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(worker: int = 0) -> None:
    """For a process that loads data, started under `signals_blocked`: only its parent ends it.

    A terminal sends Ctrl-C to all processes, and Slurm SIGTERM. Without its loaders the parent
    could not finish the step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGHUP))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Waits for the parent's SIGTERM and ends the process; other SIGTERM stay without effect."""
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent:
        pass
    os._exit(0)  # as PyTorch's own handler


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a flag; another over a second later acts at once.

    A step that was interrupted halfway (memory updated, weights not) could not be continued
    exactly. Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun.

    Yields:
        A function that returns whether there was such a signal.

    Raises:
        KeyboardInterrupt: at the end, if there was one and the body raised no error.
    """
    first: float | None = None

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > 1:
            raise KeyboardInterrupt

    with _handler(note):
        yield lambda: first is not None
    if first is not None:
        raise KeyboardInterrupt


@contextmanager
def _handler(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Handles the signals meanwhile; only the main thread may. ``nohup`` keeps its effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number in _STOPPING
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)
