"""Progress: lines in a log at most every 30 s, a bar on a terminal, nothing if it is not wanted."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mcibi_fast import cli, progress
from mcibi_fast.data import Scenes
from mcibi_fast.data.packing import pack
from mcibi_fast.nn import GaussianMemory
from mcibi_fast.progress import Progress, duration, track
from mcibi_fast.training.train import train
from tests.tiny_run import make_tiny_config

pytestmark = pytest.mark.usefixtures("own_generator")


class Clock:
    """Time that passes when it is told to, and with each look at it."""

    def __init__(self) -> None:
        self.now, self.per_look = 1000.0, 0.0

    def __call__(self) -> float:
        self.now += self.per_look
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "_now", made)
    return made


Lines = Callable[[], list[str]]


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    """What was printed to stderr since the last look."""
    return lambda: capsys.readouterr().err.splitlines()


def test_a_line_every_thirty_seconds(clock: Clock, lines: Lines) -> None:
    with Progress("epoch 1/2", unit="step", total=100, done=10) as shown:
        for _ in range(12):
            clock.now += 10
            shown.advance(note="loss 0.5000")
    assert lines() == [
        "epoch 1/2: step 13 of 100, loss 0.5000, 0.1 steps per second, 14 min left",
        "epoch 1/2: step 16 of 100, loss 0.5000, 0.1 steps per second, 14 min left",
        "epoch 1/2: step 19 of 100, loss 0.5000, 0.1 steps per second, 14 min left",
        "epoch 1/2: step 22 of 100, loss 0.5000, 0.1 steps per second, 13 min left",
    ]


def test_the_rate_is_the_latest_and_the_time_left_goes_by_the_whole(
    clock: Clock, lines: Lines
) -> None:
    with Progress("evaluate", unit="image", total=90) as shown:
        for count in (30, 10):
            clock.now += 40
            shown.advance(count)
    assert lines() == [
        "evaluate: image 30 of 90, 0.75 images per second, 80 s left",
        "evaluate: image 40 of 90, 0.25 images per second, 2 min left",
    ]


def test_work_without_a_known_end(clock: Clock, lines: Lines) -> None:
    with Progress("video", unit="frame") as shown:
        clock.now += 30
        shown.advance(60)
    assert lines() == ["video: frame 60, 2 frames per second"]


def test_short_work_prints_nothing_and_neither_does_quiet_work(clock: Clock, lines: Lines) -> None:
    for show, seconds in ((True, 2.9), (False, 100)):
        for _ in track(range(10), "predict", unit="image", show=show):
            clock.now += seconds
    assert lines() == []


def test_work_within_work_shares_the_time_between_lines(clock: Clock, lines: Lines) -> None:
    with Progress("train", unit="step", total=4) as outer:
        for _ in range(2):
            clock.now += 20
            outer.advance()
            with Progress("evaluate", unit="image", total=2) as inner:
                clock.now += 12
                inner.advance(2)
    assert [line.partition(":")[0] for line in lines()] == ["evaluate", "evaluate"]
    clock.now += 100
    with Progress("later", unit="image", total=2) as later:  # begins anew
        later.advance()
    assert lines() == []


def test_an_error_ends_the_work(clock: Clock, lines: Lines) -> None:
    def fail() -> None:
        for _ in track(range(3), "broken", unit="image"):
            raise OSError

    with pytest.raises(OSError):
        fail()
    assert not Progress._open


def test_a_bar_on_a_terminal(clock: Clock, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("train", unit="step", total=2, leave=True) as shown:
        shown.rename("epoch 1/1")
        for _ in range(2):
            clock.now += 100
            shown.advance(note="loss 0.5000")
            assert not shown.is_due()
        progress.beside(lambda line: print(line, file=sys.stderr))("a report")
    found = "\n".join(lines())
    assert "epoch 1/1: 100%" in found and "2/2" in found and "loss 0.5000" in found
    assert "steps per second" not in found
    assert re.search(r"(?m)^(\x1b\[A|\s)*a report$", found)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5000, "83 min"), (12000, "3 h 20 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


STEP = re.compile(
    r"epoch [12]/2: step \d+ of 6, loss \d+\.\d{4}, [\d.e-]+ steps per second, \d+ (s|min) left"
)


def test_nothing_else_shows_bars() -> None:
    """Every long piece of work shows its progress in this one way."""
    package = Path(progress.__file__).parent
    files = [file for file in package.rglob("*.py") if file != Path(progress.__file__)]
    assert not [f for f in files if re.search(r"(?m)^\s*(import|from) tqdm", f.read_text())]


def test_training_with_its_evaluations(clock: Clock, lines: Lines, tmp_path: Path) -> None:
    """The loss of every line, although the host reads it at the end of an epoch only."""
    clock.per_look = 6.0
    config = make_tiny_config("model.options.init=pixel", "log_every=100", "checkpoint_every=0")
    torch.manual_seed(0)
    reported: list[str] = []
    other = GaussianMemory(2, 4)  # not of this training: what it counts is not reported
    other.update(torch.full((1, 4, 2, 2), torch.inf), torch.zeros(1, 2, 2, dtype=torch.long))
    train(config, tmp_path / "run", report=reported.append)
    found = lines()
    steps = [line for line in found if STEP.fullmatch(line)]
    assert len(steps) >= 2 and any(line.startswith("evaluate: image ") for line in found)
    assert len(reported) == 2
    train(make_tiny_config(), tmp_path / "quiet", progress=False, report=reported.append)
    assert lines() == []


def test_the_initialisation_of_the_memory(clock: Clock, lines: Lines, tmp_path: Path) -> None:
    clock.per_look = 20.0
    torch.manual_seed(0)
    config = make_tiny_config("model.options.init=cluster", "epochs=1")
    train(config, tmp_path / "run", report=lambda line: None)
    assert any(line.startswith("initialise memory: batch ") for line in lines())


def test_packing_and_checking(
    clock: Clock, lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock.per_look = 20.0
    pack(Scenes("train", count=4, seed=0, size=(24, 24)), tmp_path / "shards", "train")
    found = lines()
    assert re.fullmatch(r"pack train: image \d of 4, .* images per second, .* left", found[0])
    for option in ([], ["--quiet"]):
        out = str(tmp_path / f"out{len(option)}")
        cli.main(["data", "check", str(tmp_path / "shards"), "--out", out, *option])
        shown = [line for line in lines() if line.startswith("data check: image ")]
        assert bool(shown) is not bool(option)
