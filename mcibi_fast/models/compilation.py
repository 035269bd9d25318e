"""``torch.compile`` of a model: the backbone and the head are one graph each.

Two graphs take less time to compile than one of the whole model and are as fast; what lies between
them (mixed precision, several processes) stays outside. The memory's update is part of the head's
graph.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.untrusted import shorten

BACKEND = "inductor"


def compile_model(model: Segmentor, *, sizes_differ: bool) -> None:
    """Compiles a model in place, when it is first called; names of weights do not change.

    Training and evaluation mode are compiled separately. Copies of the model, as `Segmentor.fold`
    makes, are not compiled.

    Args:
        model: on its device.
        sizes_differ: compile for images of all sizes; False compiles for each size anew.

    Raises:
        ValueError: this machine cannot compile, because it has no compiler, for example.
    """
    _watch.attach()
    _check_compiler(str(next(model.parameters()).device), BACKEND)
    for part in (model.backbone, model.head):
        part.compile(backend=BACKEND, dynamic=sizes_differ)


def not_compiled() -> AbstractContextManager[Any]:
    """A context in which compiled models run as they were before, and nothing is compiled."""
    if _watch.seconds is None:
        return nullcontext()  # spares the import of the compiler
    return torch.compiler.set_stance("force_eager")


class _Stopwatch:
    """Sums the times between the beginning and the end of compiling, in this process."""

    def __init__(self) -> None:
        self.seconds: float | None = None  # None: nothing was to be compiled yet
        self._began = 0.0

    def attach(self) -> None:
        """Takes part in all compiling from now on."""
        handler = torch._dynamo.callback_handler
        if self._start not in handler.start_callbacks:  # torch._dynamo.reset() removes it
            handler.register_start_callback(self._start)
            handler.register_end_callback(self._stop)
        self.seconds = self.seconds or 0.0

    def _start(self, _: object) -> None:
        self._began = time.perf_counter()

    def _stop(self, _: object) -> None:
        self.seconds = (self.seconds or 0.0) + time.perf_counter() - self._began


_watch = _Stopwatch()


class CompileTime:
    """Measures how long compiling takes from now on.

    Args:
        report: takes a line.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._told = _watch.seconds or 0.0

    def tell(self) -> None:
        """Reports in one line what was compiled since the last call, if anything was."""
        total = _watch.seconds or 0.0
        seconds, self._told = total - self._told, total
        if seconds:
            self._report(f"compiled in {seconds:.{0 if seconds >= 10 else 1}f} s")


@functools.cache
def _check_compiler(device: str, backend: str) -> None:
    """Compiles a sum. Raises ValueError, in one line, if that fails."""
    try:
        torch.compile(torch.add, backend=backend)(torch.ones(2, device=device), 1)
    except Exception as error:
        reason = shorten(str(error).strip().partition("\n")[0], 200)
        needed = "a C++ compiler" if device == "cpu" else "Triton and a C compiler"
        raise ValueError(
            f"compile: torch.compile does not work on this machine ({reason}); it needs {needed} "
            "and Python's headers; install them, or do not compile"
        ) from error
