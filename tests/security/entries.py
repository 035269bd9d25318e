"""Every entry point that reads other people's files, by name, so that tests attack them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.security.forked import Outcome, bounded, command

SECONDS = 60


def of_run(*words: str) -> Callable[[Path], Outcome]:
    """A command that takes a run: "{run}", "{data}" and "{out}" stand for folders."""

    def enter(run: Path) -> Outcome:
        folders = {"run": run, "data": run.parent / "data", "out": run.parent / "out"}
        folders["out"].mkdir(exist_ok=True)
        return command(*(word.format(**folders) for word in words), seconds=SECONDS, megabytes=800)

    return enter


def from_hub(run: Path) -> Outcome:
    """`models.hub` takes a folder that is here for one from the Hub."""
    from mcibi_fast.models import hub

    return bounded(hub.from_pretrained, run, seconds=SECONDS, megabytes=800)


IMAGES = "{data}/images/val"
RUN_ENTRIES: dict[str, Callable[[Path], Outcome]] = {
    "evaluate": of_run("evaluate", "{run}", "--cpu", "--quiet", "--workers", "0"),
    "predict": of_run("predict", "{run}", IMAGES, "--out", "{out}/p", "--cpu", "--quiet"),
    "video": of_run(
        *("video", "{run}", IMAGES, "--out", "{out}/v", "--no-overlay", "--cpu", "--quiet")
    ),
    "report": of_run("report", "{run}", "--cpu", "--quiet", "--out", "{out}/report.html"),
    "export": of_run("export", "{run}", "{out}/model.pt2", "--size", "32,32"),
    "train --resume": of_run("train", "--resume", "{run}", "--quiet"),
    "models.hub": from_hub,
}
"""What takes a run of this package, or its weights."""

_FIRST = ("evaluate", "train --resume", "models.hub")  # the others load a model as these do


def entries(*left_out: str) -> list[ParameterSet]:
    """The names of `RUN_ENTRIES` to parametrize with; some are slow only by their number."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in _FIRST))
        for name in RUN_ENTRIES
        if name not in left_out
    ]


def convert(file: Path) -> Outcome:
    out = file.with_name("converted.safetensors")
    return command("convert", file, out, seconds=SECONDS, megabytes=800)


def compat(file: Path) -> Outcome:
    from mcibi_fast.compat import sssegmentation

    return bounded(sssegmentation.load, file, seconds=SECONDS, megabytes=800)


RELEASED_ENTRIES: dict[str, Callable[[Path], Outcome]] = {"convert": convert, "compat": compat}
"""What takes a checkpoint of the authors' code."""


def refused(outcome: Outcome, *expected: str) -> str:
    """The one line that a command printed, or a ValueError's message, with the expected texts."""
    if outcome.error:
        assert outcome.error.startswith("ValueError: "), outcome
        line = outcome.error
    else:
        assert outcome.value == 2, outcome
        line = outcome.err
        assert line.startswith("mcibi-fast: error: ") and line.count("\n") == 1, outcome
    for text in expected:
        assert text in line, outcome
    return line
