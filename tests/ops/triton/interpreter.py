"""Runs single tests under Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and other tests need it compiling. So a test that
is marked ``interpreted`` is collected here, as any other, but called in a second process with
TRITON_INTERPRET=1, which collects the same tests and waits for their names. The process starts
with the first such test and serves all that follow. To debug one without it:

    TRITON_INTERPRET=1 pytest tests/ops/triton/test_confidence_attention_interpreted.py --pdb
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

Outcome = tuple[str, str]  # "passed", "skipped" or "failed", and why


def interpreting() -> bool:
    """Whether this process is to interpret kernels rather than compile them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not() -> str | None:
    """What the installed Triton needs to interpret kernels, if it cannot."""
    import numpy
    import triton

    def version(text: str) -> tuple[int, int]:
        major, minor, *_ = text.split(".")
        return int(major), int(minor)

    if version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4):
        return "Triton before 3.7 cannot interpret loops under NumPy 2.4: needs another of either"
    return None


class Interpreter:
    """The process with TRITON_INTERPRET=1; what it prints goes to ``log``."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: Any = None

    def run(self, test: str) -> Outcome:
        """Sets up and calls the test of a node id, and tears it down."""
        if self._process is None:
            self._start()
        try:
            self._pipe.send(test)
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code, self._process = self._process.exitcode, None
            printed = self._log.read_text(errors="replace")[-6000:]
            return "failed", f"the interpreter's process ended with status {code}:\n{printed}"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()  # it keeps nothing, and its own way out takes seconds
            self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._log), daemon=True)
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1", MCIBI_FAST_TESTS="all"):
            os.environ.pop("PYTEST_ADDOPTS", None)
            self._process.start()
        theirs.close()


class _Server:
    """A pytest plugin: instead of all tests it runs those whose names arrive."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._reports: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        tests = {item.nodeid: item for item in session.items}
        while True:
            try:
                name = self._pipe.recv()
            except EOFError:
                return True
            self._reports.clear()
            session.ihook.pytest_runtest_protocol(item=tests[name], nextitem=None)
            self._pipe.send(self._outcome())

    def _outcome(self) -> Outcome:
        for outcome in ("failed", "skipped"):
            reports = [report for report in self._reports if report.outcome == outcome]
            if reports:
                return outcome, "\n".join(map(_why, reports))
        assert [report.when for report in self._reports] == ["setup", "call", "teardown"]
        return "passed", ""


def _why(report: pytest.TestReport) -> str:
    """A traceback, or the reason of a skip."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return report.longreprtext


def _serve(pipe: Connection, log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    folder = str(Path(__file__).parent)
    pytest.main(["-m", "interpreted", "-p", "no:cacheprovider", folder], plugins=[_Server(pipe)])
