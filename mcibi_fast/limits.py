"""Limits on what a file from elsewhere may demand of this machine.

Each limit has a name, which the error message gives. ``MCIBI_FAST_<NAME>=N`` in the environment
changes it, also for the processes that load data.
"""

from __future__ import annotations

import os

LIMITS = {
    "MAX_PIXELS": 1 << 26,  # an image, a mask or a frame of a video: 8192x8192
    "MAX_SCANS": 1000,  # of a JPEG, each of which may go over all pixels
    "MAX_TIFF_VALUES": 1 << 20,  # numbers of metadata in a TIFF, such as the places of its strips
    "MAX_FILE_BYTES": 1 << 28,  # the file of an image or a mask
    "MAX_TEXT_BYTES": 1 << 25,  # a list of names, a list of classes or an index of shards
    "MAX_NAMES": 1_000_000,  # names in a list, frames of the videos in a list
    "MAX_ANNOTATION_BYTES": 1 << 30,  # PASCAL-Context's annotations
    "MAX_MAT_BYTES": 1 << 27,  # a .mat file, decompressed
    "MAX_ZIP_ENTRIES": 1_000_000,  # files and folders in a zip file
    "MAX_ZIP_LEVELS": 32,  # nested folders in a zip file
    "MAX_SHARD_BYTES": 1 << 34,  # a shard that is downloaded
}


def limit(name: str) -> int:
    """The limit called ``name``; ValueError if the environment sets it to no whole number."""
    variable = f"MCIBI_FAST_{name}"
    text = os.environ.get(variable)
    if text is None:
        return LIMITS[name]
    if not text.isdecimal():
        raise ValueError(f"{variable}: expected a whole number, got {text!r}")
    return int(text)


def check_limit(name: str, amount: int, what: str, error: type[ValueError] = ValueError) -> None:
    """Raises ``error`` if ``amount`` is more than the limit called ``name``.

    The message consists of ``what``, which names the file and says how much it demands, then the
    limit and how to raise it.
    """
    allowed = limit(name)
    if amount > allowed:
        raise error(
            f"{what}, more than {name} ({allowed:,}); "
            f"set MCIBI_FAST_{name} in the environment to raise it"
        )
