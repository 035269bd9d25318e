"""``mcibi-fast info``."""

from __future__ import annotations

import argparse
from typing import Any

import mcibi_fast

HELP = "show what was built, and which backends work here or why not"
EXTRA = ""
EXAMPLES = ("mcibi-fast info", "MCIBI_FAST_CPU=v3 mcibi-fast info")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(args: argparse.Namespace) -> None:
    """Prints how this installation was built and what of it is live."""
    for name, value in mcibi_fast.build_info().items():
        if name == "backends":
            print("backends")
            for backend, state in value.items():
                print(f"  {backend:<16}{'live' if state is True else state}")
        else:
            print(f"{name.replace('_', ' '):<18}{_words(value)}")


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
