"""How much a file from elsewhere may ask of this machine.

Each limit has a name, which the error says. ``MCIBI_FAST_<NAME>=N`` in the environment changes it,
for the processes that load data as well.
"""

from __future__ import annotations

import os

LIMITS = {
    "MAX_PIXELS": 1 << 26,  # of an image, a mask or a video's frame: 8192x8192
    "MAX_FILE_BYTES": 1 << 28,  # of an image or a mask as it is stored
    "MAX_TEXT_BYTES": 1 << 25,  # of a list of names, a list of classes or an index of shards
    "MAX_ANNOTATION_BYTES": 1 << 30,  # of PASCAL-Context's annotations
    "MAX_MAT_BYTES": 1 << 27,  # of a .mat file, decompressed
    "MAX_ZIP_ENTRIES": 1_000_000,  # files and folders in a zip file
    "MAX_ZIP_LEVELS": 32,  # folders in folders in a zip file
    "MAX_SHARD_BYTES": 1 << 34,  # of a shard that is fetched
}


def limit(name: str) -> int:
    """The limit called ``name``. Raises ValueError where the environment says no whole number."""
    variable = f"MCIBI_FAST_{name}"
    text = os.environ.get(variable)
    if text is None:
        return LIMITS[name]
    if not text.isdecimal():
        raise ValueError(f"{variable}: expected a whole number, got {text!r}")
    return int(text)


def check_limit(name: str, amount: int, what: str, error: type[ValueError] = ValueError) -> None:
    """Raises ``error`` where ``amount`` is more than the limit called ``name``.

    The message is ``what``, which names the file and says how much it asks for, then the limit and
    how to raise it.
    """
    allowed = limit(name)
    if amount > allowed:
        raise error(
            f"{what}, more than {name} ({allowed:,}); "
            f"set MCIBI_FAST_{name} in the environment to raise it"
        )
