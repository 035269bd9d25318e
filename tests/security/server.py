"""Commands and functions in a process of bounded memory and time.

What fills the memory, or never ends, fails its test and not the machine. One process serves many
tests, for importing everything takes seconds; it is started again when one has brought it down.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import resource
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MEMORY = 3 * 2**30  # what torch and the rest take is a third of it
SECONDS = 120.0

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """What came of a call.

    Attributes:
        status: a command's exit status; None if an exception got out of it, 0 for a function that
            returned.
        out, err: what it printed; for an exception ``err`` ends with its traceback.
        raised: names of the exception's classes, the most special one first; "died" or "hung" where
            the process ended or was ended.
        seconds: that it took.
    """

    status: int | None
    out: str
    err: str
    raised: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


class Bounded:
    """The process, seen from a test."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def command(self, *arguments: object, seconds: float = SECONDS) -> Outcome:
        """Runs ``mcibi-fast`` with these arguments."""
        return self._call("mcibi_fast.cli:main", [[*map(str, arguments)]], seconds)

    def function(self, name: str, *arguments: Any, seconds: float = SECONDS) -> Outcome:
        """Calls "module:function"; arguments are what JSON can hold."""
        return self._call(name, list(arguments), seconds)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _call(self, name: str, arguments: list[Any], seconds: float) -> Outcome:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"name": name, "arguments": arguments}) + "\n")
        process.stdin.flush()
        answer = _line_within(process.stdout, seconds)
        if answer:
            content = json.loads(answer)
            return Outcome(**content | {"raised": tuple(content["raised"])})
        hung = process.poll() is None and answer is None
        self.close()
        return Outcome(None, "", "", ("hung" if hung else "died",), seconds)

    def _start(self) -> subprocess.Popen[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment.pop("MCIBI_FAST_DEBUG", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.security.server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert _line_within(self._process.stdout, 300.0) == "ready\n"
        return self._process


def _line_within(stream: IO[str], seconds: float) -> str | None:
    """A line; "" at the end of the stream, None where there is none in time."""
    import select

    ready, _, _ = select.select([stream], [], [], seconds)
    return stream.readline() if ready else None


def serve() -> None:
    """Answers a line with a line, until there are no more."""
    import time

    import torch
    from accelerate.state import AcceleratorState

    from mcibi_fast.training import train  # noqa: F401  # importing takes most of the memory

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        module, _, name = request["name"].partition(":")
        start = time.monotonic()
        AcceleratorState._reset_state(True)
        out, err, status, raised = io.StringIO(), io.StringIO(), None, []
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                result = getattr(importlib.import_module(module), name)(*request["arguments"])
                status = result if isinstance(result, int) else 0
            except BaseException as error:
                raised = [each.__name__ for each in type(error).__mro__]
                traceback.print_exc(limit=-6, file=err)
        seconds = time.monotonic() - start
        answer = {"status": status, "out": out.getvalue(), "err": err.getvalue()}
        answers.write(json.dumps(answer | {"raised": raised, "seconds": seconds}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
