"""Names out of files cannot steer the terminal, nor fake a line of their own."""

from __future__ import annotations

import ast
import io
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mcibi_fast
from mcibi_fast import cli
from mcibi_fast.data.errors import DataError
from mcibi_fast.metrics import ConfusionMatrix
from mcibi_fast.terminal import LONGEST_COMPLAINT, complain, printable, say

PACKAGE = Path(mcibi_fast.__file__).parent
# Clears the screen, sets the window's title, moves up a line; rings; turns writing around; breaks
# lines in five ways; ends a string of the terminal's; is no valid UTF-8.
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x1b[1A\u202eabc\r\n\x0b\x85\u2028\x9c\x00\udcff"
pytestmark = pytest.mark.usefixtures("one_process")


def assert_harmless(text: str, lines: int | None = None) -> None:
    assert all(c.isprintable() for c in text.replace("\n", "")), repr(text)
    if lines is not None:
        assert text.count("\n") == lines, repr(text)


def test_every_character_that_has_no_picture_is_escaped() -> None:
    every = "".join(map(chr, [*range(0x3000), 0xD800, 0xFEFF, 0xE0001, 0x10FFFF]))
    shown = printable(every)
    assert_harmless(shown, 0)
    assert len(shown) > len(every)
    for bad in map(chr, [0, 7, 8, 0x1B, 0x7F, 0x90, 0x9B, 0x200B, 0x202E, 0x2066, 0x2028]):
        assert bad not in shown and unicodedata.category(bad)[0] in "CZ"


def test_text_of_all_scripts_stays() -> None:
    for text in ("road 1", "Straße", "道路", "дорога", "طريق", "🌲", "a\\b", "$x$"):
        assert printable(text) == text
    assert printable("terrain\xa0vague") == "terrain vague"
    assert printable("a\nb\x1b") == r"a\nb\x1b"
    assert printable("x" * 50, longest=10) == "x" * 9 + "…"
    assert printable(Path("a\tb")) == r"a\tb"


def test_lines_of_the_program_stay(capsys: pytest.CaptureFixture[str]) -> None:
    say("one\ntwo\x1b")
    assert capsys.readouterr().out == "one\ntwo\\x1b\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_the_terminal_cannot_encode_is_escaped(encoding: str) -> None:
    content = io.BytesIO()
    file = io.TextIOWrapper(content, encoding=encoding, errors="strict")
    say("café 道路\n\udcff\ud800", file=file)
    shown = content.getvalue().decode(encoding)
    accent = r"\xe9" if encoding == "ascii" else "é"
    letters = "道路" if encoding == "utf-8" else r"\u9053\u8def"
    assert shown == f"caf{accent} {letters}\n\\udcff\\ud800\n"


def test_a_complaint_is_one_line_of_a_bounded_length(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    complain("error: " + HOSTILE * 1000)
    err = capsys.readouterr().err
    assert err.startswith("mcibi-fast (rank 3): error: ")
    assert_harmless(err, 1)
    assert len(err) < 6 * LONGEST_COMPLAINT


def test_data_errors_are_one_line() -> None:
    assert_harmless(str(DataError(f"{HOSTILE}.png: empty")), 0)


def test_nothing_else_prints() -> None:
    """Every other ``print`` of the package would reach the terminal as it is."""
    harmless = {"commands/info.py", "commands/bench.py", "terminal.py"}  # what the program knows
    found = [
        f"{file.relative_to(PACKAGE)}:{node.lineno}"
        for file in PACKAGE.rglob("*.py")
        if str(file.relative_to(PACKAGE)) not in harmless
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func)
        in ("print", "sys.stderr.write", "sys.stdout.write", "tqdm.write")
    ]
    assert not found


def test_the_table_of_scores() -> None:
    matrix = ConfusionMatrix(2)
    matrix.matrix += 1
    for names in ([HOSTILE, "sky"], ["sky", HOSTILE]):  # the second is named in four lines more
        assert_harmless(matrix.compute().table(names), 10)


def write_folder(root: Path, name: str = "a") -> Path:
    for kind in ("images", "labels"):
        for split in ("train", "val"):
            (root / kind / split).mkdir(parents=True)
            shape = (8, 8, 3) if kind == "images" else (8, 8)
            with (root / kind / split / f"{name}.png").open("wb") as file:
                Image.fromarray(np.zeros(shape, np.uint8)).save(file, "PNG")
    return root


Fails = Callable[..., str]


def test_data_check(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "data", "x\x1b[2J\u202e\ny")
    (root / "classes.json").write_text(json.dumps([HOSTILE.replace("\x00", ""), "sky"]))
    (root / "labels" / "train" / "spare\x1b\n.png").write_bytes(b"")
    (root / "images" / "val" / "bad\x1b[1A\n.png").write_bytes(b"no image")
    (root / "labels" / "val" / "bad\x1b[1A\n.png").write_bytes(b"no image")
    assert cli.main(["data", "check", str(root), "--out", str(tmp_path / "out")]) == 2
    printed = capfd.readouterr()
    assert_harmless(printed.out)
    assert_harmless(printed.err, 1)
    assert r"bad\x1b[1A\n.png" in printed.err and "overlay_1_x__2J__y.png" in printed.out


def test_data_pack(tmp_path: Path, fails: Fails) -> None:
    pytest.importorskip("webdataset", reason="needs webdataset to write shards")
    root = write_folder(tmp_path / "data\x1b[2J")
    (root / "images" / "train" / "bad\x1b\n.png").write_bytes(b"no image")
    assert_harmless(fails("data", "pack", root, tmp_path / "out\x1b[2J\n", "--workers", "0"), 1)


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "{}"],
        ["predict", "{}", "x"],
        ["video", "{}", "x"],
        ["report", "{}"],
        ["export", "{}", "x.pt2"],
        ["convert", "{}", "x.safetensors"],
        ["train", "--resume", "{}"],
        ["train", "{}"],
        ["data", "check", "{}"],
        ["data", "pack", "{}", "{}"],
        ["ablate", "{}"],
        ["bench", "{}"],
        ["{}"],
    ],
    ids=" ".join,
)
def test_paths_and_words_in_errors(command: list[str], tmp_path: Path, fails: Fails) -> None:
    for name in ("a\x1b[2Jb\nc\u202e\x9b\x85", os.fsdecode(b"\xff\x1bx"), "x" * 100_000):
        line = fails(*(part.format(name) for part in command))
        assert_harmless(line, 1)
        assert len(line) < LONGEST_COMPLAINT * 2


def test_predict_and_video(
    security_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    with (frames / "1.png").open("wb") as file:
        Image.new("RGB", (32, 32)).save(file, "PNG")
    (frames / "2\x1b[2J\n.png").write_bytes(b"no image")
    assert cli.main(["predict", str(security_run), str(frames), "--out", str(tmp_path / "p")]) == 2
    assert_harmless(capfd.readouterr().err, 1)
    out = ["--out", str(tmp_path / "v\x1b[2J"), "--no-overlay"]
    assert cli.main(["video", str(security_run), str(frames), *out]) == 0
    printed = capfd.readouterr()
    assert_harmless(printed.err, 1)
    assert_harmless(printed.out, 1)


def test_evaluate(
    security_run: Path, security_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Class names of the data, which need not be the checkpoint's."""
    names = [f"{HOSTILE}{k}".replace("\x00", "") for k in range(3)]
    (security_data / "classes.txt").unlink()
    (security_data / "classes.json").write_text(json.dumps(names))
    arguments = ["--cpu", "--root", str(security_data), "--without-class", "1", "--workers", "0"]
    assert cli.main(["evaluate", str(security_run), *arguments]) == 0
    printed = capfd.readouterr().out
    assert_harmless(printed, 1 + 1 + 3 + 4 + 1)
    assert printed.count("owned") == 4


def test_warnings_about_videos() -> None:
    """What the package warns of by Python's means is printable before it is given, or its own."""
    calls = [
        node
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
    ]
    assert calls and all(
        isinstance(call.args[0], ast.Constant) or "printable(" in ast.unparse(call)
        for call in calls
    )
