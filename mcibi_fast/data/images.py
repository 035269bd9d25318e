"""Image files, and masks of indices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mcibi_fast import extras
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.metadata import check_directories, check_scans, pixels_alone
from mcibi_fast.data.reading import read_regular
from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.limits import check_limit, limit
from mcibi_fast.untrusted import shorten

# The formats that are decoded, and the endings of their names; the content decides which it is.
# Some other formats that PIL knows run a program (EPS) or read further files.
FORMATS = {
    "BMP": (".bmp",),
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

# PIL stretches grey of 2 and 4 bits to 0..255; dividing gives the stored index back.
_STRETCH = {"L;2": 85, "L;4": 17}


def decode(file: Path, name: str | None = None) -> Image.Image:
    """A whole image file, in memory; ``info["rawmode"]`` is how the file holds its pixels.

    Args:
        file: its path.
        name: the name that errors use; by default its path.

    Raises:
        DataError: it is missing, empty, not a regular file, in none of `FORMATS`, cannot be
            decoded, or exceeds one of the limits MAX_FILE_BYTES, MAX_PIXELS, MAX_SCANS and
            MAX_TIFF_VALUES.
    """
    name = name or str(file)
    return decode_bytes(read_image_file(file, name), name)


def read_image_file(file: Path, name: str) -> bytes:
    """An image file's content. Raises DataError as `decode` does."""
    try:
        return read_regular(file, name, "MAX_FILE_BYTES")
    except OSError as error:
        raise _undecodable(name, error.strerror or error) from error


def decode_bytes(content: bytes, name: str) -> Image.Image:
    """Like `decode`, for a file's content."""
    if not content:
        raise DataError(f"{name}: empty (0 bytes); replace or remove it")
    content = pixels_alone(content)
    check_scans(content, name)
    check_directories(content, name)
    allowed = limit("MAX_PIXELS")
    if Image.MAX_IMAGE_PIXELS is not None and allowed > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = allowed  # PIL's own, lower one would come first
    with _decoding(name), Image.open(BytesIO(content), formats=tuple(FORMATS)) as picture:
        width, height = picture.size
        check_pixels(width, height, name)
        rawmode = picture.tile[0].args if picture.tile else None
        picture.load()
        picture.info["rawmode"] = rawmode if isinstance(rawmode, str) else None
        return picture


def decode_pixels(content: bytes, name: str) -> NDArray[np.uint8]:
    """As `decode_bytes`, in colour: (H, W, 3) uint8."""
    picture = decode_bytes(content, name)
    with _decoding(name):  # some colour spaces cannot be converted
        return np.array(picture.convert("RGB"))


def read_pixels(file: Path, name: str | None = None) -> NDArray[np.uint8]:
    """As `decode`, in colour: (H, W, 3) uint8."""
    name = name or str(file)
    return decode_pixels(read_image_file(file, name), name)


def check_pixels(width: int, height: int, name: str) -> None:
    """Raises DataError for an image or a frame of more pixels than MAX_PIXELS."""
    pixels = width * height
    check_limit("MAX_PIXELS", pixels, f"{name}: {width}x{height} = {pixels:,} pixels", DataError)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turns what PIL raises into a DataError about the file ``name``."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise many kinds of errors
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


def check_labels(
    indices: NDArray[np.integer], num_classes: int, name: str, ignore_index: int = IGNORE_INDEX
) -> None:
    """Raises DataError when the mask ``name`` holds an index that is no class and not ignored."""
    bad = ((indices < 0) | (indices >= num_classes)) & (indices != ignore_index)
    if bad.any():
        raise DataError(
            f"{name}: label {indices[bad][0]} with {num_classes} classes; "
            f"use 0..{num_classes - 1}, or {ignore_index} for pixels to ignore"
        )


def check_sizes(pixels: NDArray, indices: NDArray, image: str, label: str) -> None:
    """Raises DataError when the mask named ``label`` has another size than the image's."""
    if pixels.shape[:2] != indices.shape:
        raise DataError(
            f"{label}: size {_size(indices.shape)} but {image} has {_size(pixels.shape[:2])}; "
            "a mask has its image's size"
        )


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, reversed(shape)))


def _undecodable(name: str, error: Exception | str) -> DataError:
    reason = shorten(error)
    if isinstance(error, UnidentifiedImageError):  # its text names an object in memory
        reason = f"not an image file; expected {', '.join(FORMATS)}"
    return DataError(f"{name}: cannot be decoded ({reason}); replace or remove it")


def torchvision_functional() -> Any:
    """torchvision.transforms.v2.functional. Raises ImportError that says what to do."""
    return extras.load("data.transforms", "torchvision.transforms.v2.functional")
