"""A training's settings in a TOML file: ``mcibi-fast train --config FILE``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mcibi_fast.extras import load
from mcibi_fast.untrusted import decode_text, read_bytes, shorten

# What the command line also takes, above all tables; everything else is a field of the recipe.
CHOICES = ("recipe", "root", "framework", "backbone", "memory")


def read_toml(path: str | Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The file's choices (those of `CHOICES` that it makes) and its other entries.

    Raises:
        ValueError: it is no TOML, or a choice is no text; the message names the file.
        OSError: it cannot be read.
        MissingExtra: Python 3.10 reads TOML with the package tomli, which is missing.
    """
    module = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    reader = load("--config", module)
    try:
        table = reader.loads(decode_text(read_bytes(Path(path), "MAX_JSON_BYTES")))
    except reader.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML ({shorten(error)})") from error
    except RecursionError:
        raise ValueError(f"{path}: not TOML that can be read (nested too deeply)") from None
    except ValueError as error:  # in another encoding, or too long
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    choices = {name: table.pop(name) for name in CHOICES if name in table}
    for name, value in choices.items():
        if not isinstance(value, str):
            raise ValueError(f"{path}: {name}: expected a text, got {shorten(repr(value), 60)}")
    return choices, table
