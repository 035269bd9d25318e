"""Every entry point that reads other people's files, by name, so that tests attack them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.security.server import Bounded, Outcome


def of_run(*command: str) -> Callable[..., Outcome]:
    """A command that takes a run: "{run}", "{data}" and "{out}" stand for folders."""

    def enter(bounded: Bounded, run: Path, *more: object) -> Outcome:
        out = run.parent / "out"
        out.mkdir(exist_ok=True)
        data = run.parent / "data"
        words = [word.format(run=run, data=data, out=out) for word in command]
        return bounded.command(*words, *more)

    return enter


def from_hub(bounded: Bounded, run: Path) -> Outcome:
    return bounded.function("tests.security.entries:load_from_folder", str(run))


def load_from_folder(folder: str) -> None:
    """`models.hub` takes a folder that is here for one from the Hub."""
    from mcibi_fast.models import hub

    hub.from_pretrained(folder)


RUN_ENTRIES: dict[str, Callable[..., Outcome]] = {
    "evaluate": of_run("evaluate", "{run}", "--cpu", "--quiet", "--workers", "0"),
    "predict": of_run(
        "predict", "{run}", "{data}/images/val", "--out", "{out}/p", "--cpu", "--quiet"
    ),
    "video": of_run(
        "video",
        "{run}",
        "{data}/images/val",
        "--out",
        "{out}/v",
        "--cpu",
        "--quiet",
        "--no-overlay",
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
    slow = {name: [pytest.mark.slow] * (name not in _FIRST) for name in RUN_ENTRIES}
    return [pytest.param(n, marks=marks) for n, marks in slow.items() if n not in left_out]


def convert(bounded: Bounded, file: Path) -> Outcome:
    return bounded.command("convert", file, file.with_name("converted.safetensors"))


def compat(bounded: Bounded, file: Path) -> Outcome:
    return bounded.function("tests.security.entries:load_released", str(file))


def load_released(file: str) -> None:
    from mcibi_fast.compat import sssegmentation

    sssegmentation.load(file)


RELEASED_ENTRIES: dict[str, Callable[[Bounded, Path], Outcome]] = {
    "convert": convert,
    "compat": compat,
}
"""What takes a checkpoint of the authors' code."""


def refused(outcome: Outcome, *expected: str) -> str:
    """The one line that a command printed, or the message of an exception, with status 2."""
    line = outcome.last_line
    if outcome.status is None:
        assert "ValueError" in outcome.raised, (outcome.raised, outcome.err)
    else:
        assert outcome.status == 2, (outcome.out, outcome.err)
        assert outcome.err.startswith("mcibi-fast: error: ") and outcome.err.count("\n") == 1
    for text in expected:
        assert text in line, line
    return line
