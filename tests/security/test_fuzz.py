"""A short fuzz of every kind of file, and whether the fuzz would notice."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mcibi_fast.data import DataError
from tests.security import fuzz
from tests.security.fuzz import Kind
from tests.security.kinds import KINDS
from tests.security.mutations import mutate_json, repair_png

FILES = 30


def no_log(line: str) -> None:
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_raise_named_errors_alone(kind: str, tmp_path: Path) -> None:
    """`make fuzz` does so for ten minutes; a failure there is to become a test of its own."""
    for failure in fuzz.fuzz({kind: KINDS[kind]}, files=FILES, log=no_log):
        path = failure.keep(KINDS, 0, tmp_path)
        pytest.fail(f"{path}: {failure.reason}")


@pytest.mark.parametrize("kind", KINDS)
def test_good_files_are_read(kind: str, tmp_path: Path) -> None:
    for number, content in enumerate(KINDS[kind].seeds()):
        folder = tmp_path / str(number)
        folder.mkdir()
        if kind == "gif":
            with pytest.raises(DataError, match="not an image file"):
                KINDS[kind].read(content, folder)
        else:
            KINDS[kind].read(content, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_makes_the_same_files(kind: str) -> None:
    first = [fuzz.damaged(kind, KINDS[kind], 5, number) for number in range(20)]
    assert first == [fuzz.damaged(kind, KINDS[kind], 5, number) for number in range(20)]
    assert first != [fuzz.damaged(kind, KINDS[kind], 6, number) for number in range(20)]
    assert len(set(first)) > 10


def seventh(reader: Callable[[], object]) -> list[fuzz.Failure]:
    """What the fuzz says of ten files of which one, the seventh, is read by ``reader``."""
    numbers = iter(range(10))

    def read(content: bytes, folder: Path) -> None:
        if next(numbers) == 7:
            reader()

    return fuzz.fuzz({"x": Kind(lambda: [b"abc"], read)}, files=10, log=no_log)


def fail(error: Exception) -> Callable[[], object]:
    def reader() -> None:
        raise error

    return reader


def fill() -> None:
    bytes(1 << 30)


def fill_and_hide() -> None:
    try:
        bytes(1 << 30)
    except MemoryError as error:
        raise DataError("x: cannot be decoded") from error


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        (fail(KeyError("a")), "KeyError: 'a' (in "),
        (fail(RecursionError("deep")), "RecursionError: deep"),
        (fail(UnicodeError("x")), "UnicodeError: x"),
        (fail(ValueError("x")), "ValueError: x"),
        (fail(OSError("two\nlines")), "OSError of 9 characters, not one line"),
        (fail(OSError("x" * 3000)), "OSError of 3000 characters, not one line"),
        (fail(DataError("")), "DataError of 0 characters, not one line"),
        (fill, "takes more than 256 MB"),
        (fill_and_hide, "takes more than 256 MB, and says: x: cannot be decoded"),
        (os.abort, "the process died with -6"),
    ],
)
def test_failures_are_noticed(reader: Callable[[], object], reason: str) -> None:
    (failure,) = seventh(reader)
    assert failure.number == 7 and reason in failure.reason


def test_what_takes_long_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    (failure,) = seventh(lambda: time.sleep(60))
    assert failure.number == 7 and failure.reason == "takes longer than 0.5 seconds"


@pytest.mark.parametrize(
    "error", [DataError("x: empty"), FileNotFoundError(2, "No such file", "x")]
)
def test_named_errors_are_no_failures(error: Exception) -> None:
    assert seventh(fail(error)) == []


def test_checksums_are_repaired() -> None:
    good = KINDS["png"].seeds()[0]
    assert repair_png(good) == good
    at = good.index(b"IHDR") + 7
    damaged = good[:at] + bytes([good[at] ^ 8]) + good[at + 1 :]
    repaired = repair_png(damaged)
    assert repaired != damaged and len(repaired) == len(damaged)
    assert repair_png(good[:60]) == good[:60]


def test_json_stays_json() -> None:
    content = KINDS["index"].seeds()[0]
    for number in range(300):
        json.loads(mutate_json(content, random.Random(number)))


def test_the_command_keeps_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = fail(KeyError("a"))
    kinds = {"x": Kind(lambda: [b"abc"], lambda content, folder: read())}
    monkeypatch.setattr("tests.security.kinds.KINDS", kinds)
    monkeypatch.setattr(fuzz, "BATCH", 3)
    arguments = ["--seconds", "1", "--seed", "4", "--keep", str(tmp_path / "kept")]
    assert fuzz.main(arguments) == 1
    (first, *_) = sorted((tmp_path / "kept").iterdir())
    assert first.read_bytes() == fuzz.damaged("x", kinds["x"], 4, int(first.name.split("-")[-1]))
    assert "x-4-" in capsys.readouterr().err
    kinds["x"] = kinds["x"]._replace(read=lambda content, folder: None)
    assert fuzz.main(arguments) == 0
