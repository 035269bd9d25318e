"""What reaches the terminal: names out of files cannot steer it, nor fake a line of their own."""

from __future__ import annotations

import os
import sys
import unicodedata
from typing import TextIO

LONGEST_COMPLAINT = 2000
"""Characters of a complaint; what is longer ends in dots."""


def printable(text: object, *, longest: int | None = None) -> str:
    r"""Text in one line, with escapes such as ``\x1b`` and ``\n`` for what a terminal would obey.

    These are control characters, line breaks, marks that turn the direction of writing, and
    everything else that has no picture (as ``str.isprintable`` says). Letters of all scripts stay.

    Args:
        text: anything; a file's path, too, whose name need not be valid UTF-8.
        longest: cut it to so many characters, the last of which are dots.
    """
    shown = str(text)
    if longest is not None and len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    if shown.isprintable():
        return shown
    return "".join(map(_shown, shown))


def say(text: str, *, file: TextIO | None = None) -> None:
    """Prints text of one line or more, each as `printable` has it."""
    print("\n".join(map(printable, text.split("\n"))), file=file, flush=True)


def complain(message: str) -> None:
    """Prints one line on stderr that begins with the program's name, and its rank if it has one."""
    rank = os.environ.get("RANK")
    line = " ".join(message.split())
    say(
        printable(
            f"mcibi-fast{f' (rank {rank})' if rank else ''}: {line}", longest=LONGEST_COMPLAINT
        ),
        file=sys.stderr,
    )


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    if unicodedata.category(character) == "Zs":  # a space that is not broken, or of another width
        return " "
    return character.encode("unicode_escape").decode("ascii")
