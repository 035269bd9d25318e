"""Ctrl-C waits for the step; a second one does not."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from mcibi_fast import interrupt
from mcibi_fast.interrupt import deferred_interrupt


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_first_is_a_flag_and_the_second_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    now = 100.0
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as interrupted:
        assert not interrupted()
        press()
        assert interrupted()
        now += 0.5
        press()  # the same Ctrl-C, passed on by torchrun
        now += 5
        press()
        pytest.fail("the second Ctrl-C did nothing")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_press_that_nobody_looked_at_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        press()
    with deferred_interrupt():
        pass


def test_outside_the_main_thread_it_does_nothing() -> None:
    seen: list[bool] = []

    def work() -> None:
        with deferred_interrupt() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
