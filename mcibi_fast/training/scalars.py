"""TensorBoard scalars, written immediately and not by a thread whose errors would go unnoticed."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from mcibi_fast.files import make_folder, naming, open_new


class ScalarLog:
    """Appends scalars to a new event file.

    Args:
        folder: TensorBoard's log directory; created if needed, and a link in its place is replaced.
        first_step: events of this step and later in older files of the folder are void.
    """

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        make_folder(folder, below=folder.parent)
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        # Unbuffered, or closing would fail again with what could not be written.
        self.file = open_new(self.path, buffering=0)
        self.writer = RecordWriter(self.file)
        self._write(Event(step=first_step, file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Writes values of one step, named by the prefix and their key.

        Raises:
            OSError: e.g. the disk is full, naming the file.
        """
        scalars = [Summary.Value(tag=prefix + name, simple_value=v) for name, v in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with naming(self.path):
            self.writer.write(event.SerializeToString())
