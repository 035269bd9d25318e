"""Runs an attack in a process of its own, where it can neither hang nor fill the machine."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from mcibi_fast import cli

# Imported before a process is forked: their libraries are no part of what an attack may take.
for heavy in (
    "accelerate",
    "cv2",
    "matplotlib.figure",
    "mcibi_fast.compat.sssegmentation",
    "mcibi_fast.inference.export",
    "mcibi_fast.models.hub",
    "mcibi_fast.reports.runs",
    "mcibi_fast.training.train",
    "sklearn.manifold",
    "timm",
    "torchvision",
    "webdataset",
    "mcibi_fast.recipes.registry",
):
    importlib.import_module(heavy)


class Outcome(NamedTuple):
    """What a call in a forked process returned, raised and printed.

    Attributes:
        value: what the function returned, as far as it is a number or a text.
        error: "DataError: <its message>" of what it raised; "" where it returned.
        out, err: what it printed.
    """

    value: object
    error: str
    out: str
    err: str


def bounded(
    function: Callable[..., object],
    *arguments: object,
    seconds: int = 30,
    megabytes: int = 400,
    **options: object,
) -> Outcome:
    """Calls a function in a forked process.

    Args:
        function, arguments, options: what is called.
        seconds: of waiting and of computing that it may take.
        megabytes: of memory that it may take beyond what this process has.

    Raises:
        AssertionError: it took longer, or died.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(
        target=_call, args=(sender, seconds, megabytes, function, arguments, options)
    )
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise AssertionError(f"{function} takes longer than {seconds} seconds")
        return receiver.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"{function} died with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def command(*arguments: object, seconds: int = 30, megabytes: int = 400) -> Outcome:
    """Runs ``mcibi-fast`` in a forked process; ``value`` of the result is its exit status."""
    return bounded(cli.main, [*map(str, arguments)], seconds=seconds, megabytes=megabytes)


def refused(*arguments: object, seconds: int = 30, megabytes: int = 400) -> str:
    """The one line with which a command in a forked process refuses its input."""
    outcome = command(*arguments, seconds=seconds, megabytes=megabytes)
    assert outcome.value == 2, outcome
    assert outcome.err.startswith("mcibi-fast: error: ") and outcome.err.count("\n") == 1, outcome
    return outcome.err


def limit_memory(megabytes: int) -> None:
    """Lets this process take so much more address space than it has."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _call(
    sender: Connection,
    seconds: int,
    megabytes: int,
    function: Callable[..., object],
    arguments: tuple,
    options: dict,
) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_memory(megabytes)
    out, err = io.StringIO(), io.StringIO()
    value, error = None, ""
    with redirect_stdout(out), redirect_stderr(err):
        try:
            value = function(*arguments, **options)
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
    if not isinstance(value, (int, float, str)):
        value = None
    sender.send(Outcome(value, error, out.getvalue(), err.getvalue()))
    sys.stdout.flush()
    os._exit(0)
