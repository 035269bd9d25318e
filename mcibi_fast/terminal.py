"""Prints to the terminal so that names read from files can neither control it nor fake a line."""

from __future__ import annotations

import os
import sys
import unicodedata
import warnings
from typing import TextIO

from mcibi_fast.errors import DataWarning

LONGEST_COMPLAINT = 2000
"""Largest number of characters of an error message; longer ones are cut and end in dots."""


def printable(text: object, *, longest: int | None = None) -> str:
    r"""The text in one line, with escapes such as ``\x1b`` and ``\n`` for what a terminal obeys.

    These are control characters, line breaks, marks that change the direction of writing, and
    everything else that is not printable (``str.isprintable``). Letters of all scripts stay.

    Args:
        text: any object, for example a file's path, whose name need not be valid UTF-8.
        longest: cut the text to this many characters; the last one is then an ellipsis.
    """
    shown = str(text)
    if longest is not None and len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    if shown.isprintable():
        return shown
    return "".join(map(_shown, shown))


def say(text: str, *, file: TextIO | None = None) -> None:
    """Prints one or more lines of text after passing each through `printable`.

    What the terminal's encoding lacks is printed as an escape, too.
    """
    file = file or sys.stdout
    shown = "\n".join(map(printable, text.split("\n")))
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def complain(message: str) -> None:
    """Prints one line to stderr, beginning with the program's name and its rank, if it has one."""
    rank = os.environ.get("RANK")
    line = " ".join(message.split())
    say(
        printable(
            f"mcibi-fast{f' (rank {rank})' if rank else ''}: {line}", longest=LONGEST_COMPLAINT
        ),
        file=sys.stderr,
    )


def warn(text: str) -> None:
    """Warns about data by Python's means."""
    warnings.warn(printable(text), DataWarning, stacklevel=3)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Stands in for `warnings.showwarning` in the command line: in one line, as errors are."""
    if issubclass(category, DataWarning):
        complain(f"warning: {message}")
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        print(text, end="", file=file or sys.stderr)


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    if unicodedata.category(character) == "Zs":  # a space of another width or without line break
        return " "
    return character.encode("unicode_escape").decode("ascii")
