"""The commands of ``mcibi-fast``, one module each."""

from __future__ import annotations

import argparse
from typing import Protocol


class Command(Protocol):
    """What a command's module offers.

    ``--help`` imports all of them, so at their top they import nothing that takes time.
    """

    HELP: str
    EXTRA: str
    """Of `mcibi_fast.extras`, which it needs; "" where torch and numpy are enough."""
    EXAMPLES: tuple[str, str]
    """Two command lines, which end its help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the command's own arguments and those it shares (`commands.options`)."""

    def run(self, args: argparse.Namespace) -> int | None:
        """Does the work; the exit status, or None for 0."""
