"""Image files."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import Image

from .errors import DataError

# What PIL raises on files that are not whole: a broken PNG chunk is a SyntaxError.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


def decode(file: Path, name: str | None = None) -> Image.Image:
    """A whole image file, in memory; ``info["rawmode"]`` is how the file holds its pixels.

    Args:
        file: where it lies.
        name: what the error calls it; default its path.

    Raises:
        DataError: it is missing, empty, or cannot be decoded.
    """
    name = name or str(file)
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{name}: empty (0 bytes); replace or remove it")
        with Image.open(file) as picture:
            rawmode = picture.tile[0].args if picture.tile else None
            picture.load()
            picture.info["rawmode"] = rawmode if isinstance(rawmode, str) else None
            return picture
    except DataError:
        raise
    except _DECODING_ERRORS as error:
        reason = " ".join(str(error).replace(str(file), name).split())
        raise DataError(f"{name}: cannot be decoded ({reason}); replace or remove it") from error
