"""The page: one file that needs nothing from outside, and its template in a wheel."""

from __future__ import annotations

import base64
import html
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast.reports.page import Report

ROOT = Path(__file__).resolve().parents[2]


def test_page_is_whole_and_needs_nothing_from_outside() -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    report = Report("A & B <i>")
    report.heading("Part <1>")
    report.text("less < more")
    report.table(["model", "mIoU"], [["FCN", "1.5"], ["<b>", "2"]])
    report.picture(picture, 'a "caption"')
    page = report.html()
    assert "<title>A &amp; B &lt;i&gt;</title>" in page and "Part &lt;1&gt;" in page
    assert "<td>&lt;b&gt;</td>" in page and "less &lt; more" in page
    assert not re.search(r"https?:|<script|<link|@import|url\(|src=\"(?!data:)", page)
    ((data, alt),) = re.findall(r'src="data:image/png;base64,([^"]+)"\s+alt="([^"]+)"', page)
    assert html.unescape(alt) == 'a "caption"'
    embedded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert np.array_equal(np.array(embedded), np.array(picture))


def test_names_are_escaped_in_legend_and_folded_tables() -> None:
    report = Report("page")
    report.legend(["<sky>", "a & b"], [[1, 2, 3], [4, 5, 6]])
    report.table(["field"], [["<x>"]], fold="all <fields>")
    page = report.html()
    assert "rgb(1, 2, 3)" in page and "&lt;sky&gt;" in page and "a &amp; b" in page
    assert "<summary>all &lt;fields&gt;</summary>" in page and "<td>&lt;x&gt;</td>" in page
    assert "<sky>" not in page and "<x>" not in page


def test_named_pictures_can_be_taken_out_again() -> None:
    report = Report("page")
    first, second = (Image.new("RGB", (3, 2), colour) for colour in ("red", "blue"))
    report.picture(first, "one", name="same")
    report.picture(second, "two", name="same")
    report.picture(second, "three")
    assert list(report.pictures) == ["same"] and report.html().count("data:image/png") == 3
    assert Image.open(io.BytesIO(report.pictures["same"])).getpixel((0, 0)) == (255, 0, 0)


class Tags(HTMLParser):
    """The tags of a page, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_no_text_becomes_markup() -> None:
    def fill(text: str) -> str:
        report = Report(text)
        report.heading(text)
        report.text(text)
        report.code(text)
        report.legend([text], [[1, 2, 3]])
        report.table([text], [[text]], fold=text)
        report.picture(Image.new("RGB", (3, 2)), text, wide=True)
        return report.html()

    hostile = "<script>{{ 7 * 7 }}</script>\"'><b>&amp;"
    plain, filled = Tags(fill("plain")), Tags(fill(hostile))
    assert filled.tags == plain.tags
    assert filled.texts == [text.replace("plain", hostile) for text in plain.texts]
    assert filled.texts.count(hostile) == 10  # the title twice


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "buildtools").is_dir(), reason="needs the source tree")
def test_a_wheel_holds_the_template(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("buildtools", "csrc", "mcibi_fast"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "*.json"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "."]
    environment = os.environ | {"CXX": "/no/compiler", "MCIBI_FAST_CUDA": "0"}
    subprocess.run([*command, "-w", tmp_path], cwd=tree, env=environment, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    folder = ROOT / "mcibi_fast" / "reports" / "templates"
    templates = {str(path.relative_to(ROOT)) for path in folder.iterdir()}
    assert templates and templates <= set(zipfile.ZipFile(wheel).namelist())
