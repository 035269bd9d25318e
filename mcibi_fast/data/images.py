"""Image files, and masks of indices."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mcibi_fast import extras
from mcibi_fast.data.errors import DataError

# What PIL raises for incomplete files: a broken PNG chunk is a SyntaxError.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
# PIL stretches grey of 2 and 4 bits to 0..255; dividing gives the stored index back.
_STRETCH = {"L;2": 85, "L;4": 17}


def decode(file: Path, name: str | None = None) -> Image.Image:
    """A whole image file, in memory; ``info["rawmode"]`` is how the file holds its pixels.

    Args:
        file: its path.
        name: the name that errors use; by default its path.

    Raises:
        DataError: it is missing, empty, or cannot be decoded.
    """
    name = name or str(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _undecodable(name, error, str(file)) from error
    return decode_bytes(content, name)


def decode_bytes(content: bytes, name: str) -> Image.Image:
    """Like `decode`, for a file's content."""
    if not content:
        raise DataError(f"{name}: empty (0 bytes); replace or remove it")
    try:
        with Image.open(BytesIO(content)) as picture:
            rawmode = picture.tile[0].args if picture.tile else None
            picture.load()
            picture.info["rawmode"] = rawmode if isinstance(rawmode, str) else None
            return picture
    except _DECODING_ERRORS as error:
        raise _undecodable(name, error) from error


def mask_indices(picture: Image.Image, name: str) -> NDArray[np.integer]:
    """The indices (H, W) that a decoded mask holds; a palette's colours are not looked up.

    Raises:
        DataError: a mask in colour.
    """
    if picture.mode not in ("L", "P", "1", "I", "I;16"):
        raise DataError(
            f"{name}: a colour mask ({picture.mode}); save class indices as a greyscale or "
            "palette PNG"
        )
    indices = np.array(picture)
    if picture.mode == "1":
        indices = indices.astype(np.uint8)
    indices //= _STRETCH.get(picture.info["rawmode"], 1)
    return indices


def check_sizes(pixels: NDArray, indices: NDArray, image: str, label: str) -> None:
    """Raises DataError when the mask named ``label`` has another size than the image's."""
    if pixels.shape[:2] != indices.shape:
        raise DataError(
            f"{label}: size {_size(indices)} but {image} has {_size(pixels)}; "
            "a mask has its image's size"
        )


def _size(array: NDArray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _undecodable(name: str, error: Exception, path: str = "") -> DataError:
    reason = " ".join((str(error).replace(path, name) if path else str(error)).split())
    if isinstance(error, UnidentifiedImageError):  # its text names an object in memory
        reason = "not an image file"
    return DataError(f"{name}: cannot be decoded ({reason}); replace or remove it")


def torchvision_functional() -> Any:
    """torchvision.transforms.v2.functional. Raises ImportError that says what to do."""
    return extras.load("data.transforms", "torchvision.transforms.v2.functional")
