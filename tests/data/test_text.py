"""Lists of names and classes in other encodings, and palettes of anything but bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast.data import check
from mcibi_fast.data.archives import Files
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.folder import class_list
from mcibi_fast.data.reading import check_name
from mcibi_fast.untrusted import decode_text, parse_json, read_json

NAMES = ["Straße", "道路", "café"]
MARKED = ("utf-8", "utf-8-sig", "utf-16", "utf-32")


def json_list(root: Path, encoding: str) -> list[str]:
    (root / "classes.json").write_bytes(json.dumps(NAMES, ensure_ascii=False).encode(encoding))
    found = class_list(root)
    return [] if found is None else found.names


def text_list(root: Path, encoding: str) -> list[str]:
    (root / "classes.txt").write_bytes("\r\n".join(NAMES).encode(encoding))
    found = class_list(root)
    return [] if found is None else found.names


def name_list(root: Path, encoding: str) -> list[str]:
    (root / "val.txt").write_bytes("\n".join(NAMES).encode(encoding))
    return Files(root, "val.txt").lines("val.txt")


def configuration(root: Path, encoding: str) -> list[str]:
    (root / "config.json").write_bytes(json.dumps(NAMES, ensure_ascii=False).encode(encoding))
    return read_json(root / "config.json")


READERS: dict[str, Callable[[Path, str], list[str]]] = {
    "classes.json": json_list,
    "classes.txt": text_list,
    "val.txt": name_list,
    "config.json": configuration,
}


@pytest.mark.parametrize("encoding", [*MARKED, "utf-16-be"])
@pytest.mark.parametrize("file", READERS)
def test_byte_order_marks(file: str, encoding: str, tmp_path: Path) -> None:
    if encoding in MARKED:
        assert READERS[file](tmp_path, encoding) == NAMES
        return
    with pytest.raises(ValueError, match=f"{file}: .*not a text file in UTF-8.*; save it as UTF-8"):
        READERS[file](tmp_path, encoding)  # without a mark


@pytest.mark.parametrize("file", READERS)
def test_latin_1(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.NAMES", ["Straße", "café"])
    with pytest.raises(
        ValueError, match=rf"{file}: .*not a text file in UTF-8 \(.* byte 0xdf in position \d+"
    ):
        READERS[file](tmp_path, "latin-1")


def test_a_cut_character() -> None:
    with pytest.raises(ValueError, match=r"not a text file in UTF-8 \('utf-16.*truncated"):
        decode_text("ab".encode("utf-16")[:-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": [1, 2', r"not JSON \(Expecting .*\); it is cut off"),
        (b'{"a": "tex', r"not JSON \(Unterminated string.*\); it is cut off"),
        (b'{"a"', "it is cut off"),
        (b" \n", r"not JSON \(nothing is in it\)"),
        (b'{"a": 1]', r"not JSON \(Expecting ',' delimiter: line 1 column 8 \(char 7\)\)$"),
    ],
)
def test_what_is_cut_off_is_said(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(content)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json: not JSON .*; restore it from a copy$"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("palette", "message"),
    [
        ([[0.5, 0.2, 1.0], [0, 0, 0]], r"\[0.5, 0.2, 1.0\] is no colour; expected three whole"),
        ([[0, 0, 256], [0, 0, 0]], r"\[0, 0, 256\] is no colour"),
        ([[0, 0, -1], [0, 0, 0]], r"\[0, 0, -1\] is no colour"),
        ([[True, 0, 0], [0, 0, 0]], r"\[True, 0, 0\] is no colour"),
        ([["0", 0, 0], [0, 0, 0]], "is no colour"),
        ([[0, 0], [0, 0]], r"\[0, 0\] is no colour"),
        ([[0, 0, 0]], "palette of 1 colours, 2 classes"),
        ({"a": 1}, "palette of 0 colours, 2 classes"),
        (7, "palette of 0 colours, 2 classes"),
    ],
)
def test_palettes(palette: object, message: str, tmp_path: Path) -> None:
    content = {"classes": ["a", "b"], "palette": palette}
    (tmp_path / "classes.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"classes.json: .*{message}"):
        class_list(tmp_path)


def test_names_that_no_file_can_have() -> None:
    check_name("a\udcff.png", "list")  # a byte that is no UTF-8
    with pytest.raises(DataError, match=r"list: .*cannot be the name of a file"):
        check_name("a\ud800.png", "list")


def test_overlays_of_images_with_long_names(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind / "train").mkdir(parents=True)
        shape = (8, 8, 3) if kind == "images" else (8, 8)
        picture = Image.fromarray(np.zeros(shape, np.uint8))
        picture.save(tmp_path / kind / "train" / ("𠀀" * 62 + ".png"))
    report = check(tmp_path, tmp_path / "out", classes=["a"], progress=False)
    assert len(report.overlays) == 1 and report.overlays[0].is_file()
