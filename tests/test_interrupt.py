"""Ctrl-C waits for the step; a second one does not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
from multiprocessing.process import BaseProcess

import pytest

from mcibi_fast import interrupt
from mcibi_fast.data import Scenes
from mcibi_fast.data.loading import training_loader
from mcibi_fast.interrupt import deferred_interrupt, signals_interrupt


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


@pytest.mark.usefixtures("heard_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_are_the_same(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as interrupted:
        os.kill(os.getpid(), number)
        assert interrupted()
    with pytest.raises(KeyboardInterrupt), signals_interrupt():
        os.kill(os.getpid(), number)
        pytest.fail("nothing was raised")
    assert signal.getsignal(number) is signal.SIG_DFL


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_interrupt(), deferred_interrupt() as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGHUP, before)


def send_from_elsewhere(process: BaseProcess) -> None:
    """All three signals, from a process that is not its parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        subprocess.run(["kill", f"-{int(number)}", str(process.pid)], check=True)


def test_loaders_are_ended_by_their_parent_alone() -> None:
    scenes = Scenes("train", count=40, size=(16, 16), seed=0)
    others = set(multiprocessing.active_children())
    batches = training_loader(scenes, batch_size=2, seed=0, epoch=0, workers=1)
    next(batches)
    (loader,) = set(multiprocessing.active_children()) - others
    send_from_elsewhere(loader)
    assert sum(1 for _ in batches) == 19

    batches = training_loader(scenes, batch_size=2, seed=0, epoch=0, workers=1)
    next(batches)
    (loader,) = set(multiprocessing.active_children()) - others
    loader.terminate()
    loader.join(10)
    assert loader.exitcode == 0


def test_loaders_begin_without_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes while they start reaches the parent alone."""

    def start(process: BaseProcess) -> None:
        original(process)
        send_from_elsewhere(process)
        os.kill(os.getpid(), signal.SIGTERM)

    original = BaseProcess.start
    monkeypatch.setattr(BaseProcess, "start", start)
    scenes = Scenes("train", count=8, size=(16, 16), seed=0)
    batches = training_loader(scenes, batch_size=2, seed=0, epoch=0, workers=2)
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as interrupted:
        assert sum(1 for _ in batches) == 4
        assert interrupted()
