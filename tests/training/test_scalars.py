"""TensorBoard event files."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from mcibi_fast.training.scalars import ScalarLog


def read(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_reads_it(tmp_path: Path) -> None:
    log = ScalarLog(tmp_path)
    for step in (1, 2, 3):
        log.add(step, {"loss": step / 2, "lr": 0.25}, "train/")
    assert read(tmp_path, "train/loss") == [(1, 0.5), (2, 1.0), (3, 1.5)]  # not closed yet
    log.close()
    assert read(tmp_path, "train/lr") == [(1, 0.25), (2, 0.25), (3, 0.25)]


def test_a_resumed_run_voids_what_was_written_after_its_checkpoint(tmp_path: Path) -> None:
    killed = ScalarLog(tmp_path)
    for step in (1, 2, 3):
        killed.add(step, {"loss": 1.0})
    killed.close()
    resumed = ScalarLog(tmp_path, first_step=3)
    resumed.add(3, {"loss": 2.0})
    resumed.close()
    assert read(tmp_path, "loss") == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_full_disk_names_the_file(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, which Linux has")
    log = ScalarLog(tmp_path)
    log.close()
    log.path = Path("/dev/full")
    log.file = log.path.open("wb", buffering=0)
    log.writer = RecordWriter(log.file)
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as info:
        log.add(1, {"loss": 1.0})
    assert info.value.errno == errno.ENOSPC
    log.close()
