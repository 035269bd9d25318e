"""The pages of the documentation, and the links, commands and blocks of code in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


class Block(NamedTuple):
    """A block of code: its language ("" for commands), and its text."""

    language: str
    text: str


def pages() -> list[Path]:
    """README and its neighbours, and everything that the site shows."""
    top = sorted(ROOT.glob("*.md"))
    elsewhere = [ROOT / "benchmarks" / "NOTES.md", ROOT / "csrc" / "testing" / "README.md"]
    return [*top, *sorted((ROOT / "docs").rglob("*.md")), *elsewhere]


def blocks(page: Path) -> list[Block]:
    """In the order in which they stand."""
    return [Block(*found) for found in _FENCE.findall(page.read_text())]


def commands(page: Path) -> list[str]:
    """The lines of the blocks without a language, joined where a backslash ends them."""
    texts = [block.text for block in blocks(page) if not block.language]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return _FENCE.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """Targets of all links."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """Names of the page's headings in addresses."""
    titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in _HEADING.findall(prose(page)))
    return {title.strip().replace(" ", "-") for title in titles}
