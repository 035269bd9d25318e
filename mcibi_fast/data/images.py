"""Image files, and masks of indices: one reader for all of the package.

Colours become three bands of 8 bits, by these rules:

- EXIF's orientation is applied, to pictures and masks alike. A mask that has the size of the
  picture as it is stored, not of the turned one, was made without it: that picture is not turned.
- Grey values of 16 bits and fractions in 0..1 are scaled by their range, so that its end becomes
  255 (of colours with 16 bits, PIL takes the high byte). Fractions beyond 0..1, signed and 32-bit
  integers, and values that end within a sixteenth of their range (12 bits in 16) are refused: what
  their range is cannot be known.
- Bands beyond colour are dropped. Alpha is among them: nothing is blended, and the colours of
  transparent pixels are those in the file.

A mask has one band of indices, or a palette, whose colours are not looked up. Others, and masks in
lossy compression, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mcibi_fast import extras
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.metadata import (
    check_directories,
    check_scans,
    exif_of_jpeg,
    orientation,
    pixels_alone,
)
from mcibi_fast.data.notes import Notes
from mcibi_fast.data.reading import read_regular
from mcibi_fast.data.strips import colours
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
_GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")
_LOSSY = ("jpeg", "tiff_jpeg", "webp", "jpeg2000")  # compressions of a TIFF
_ALMOST_BLACK = 16  # of 255
# Tags of a TIFF: INVERTED is 0 if white is, SIGNED is 2 for signed numbers.
_ORIENTATION, _INVERTED, _BITS, _BANDS, _PLANAR, _SIGNED = 274, 262, 258, 277, 284, 339


class Decoded(NamedTuple):
    """Colours (H, W, 3) uint8, turned; and the orientation by which they were, 1 if not."""

    pixels: NDArray[np.uint8]
    orientation: int


def decode(file: Path, name: str | None = None) -> Image.Image:
    """A whole image file, in memory; ``info["rawmode"]`` is how the file holds its pixels.

    ``info["orientation"]`` is EXIF's. Only of a TIFF has it been applied (by PIL).

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
    exif = exif_of_jpeg(content)
    content = pixels_alone(content)
    check_scans(content, name)
    check_directories(content, name)
    allowed = limit("MAX_PIXELS")
    if Image.MAX_IMAGE_PIXELS is not None and allowed > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = allowed  # PIL's own, lower one would come first
    is_tiff = content[:2] in (b"II", b"MM")
    with (
        _decoding(name, is_tiff),
        Image.open(BytesIO(content), formats=tuple(FORMATS)) as picture,
    ):
        width, height = picture.size
        check_pixels(width, height, name)
        rawmode = picture.tile[0].args if picture.tile else None
        if isinstance(rawmode, tuple) and rawmode:
            rawmode = rawmode[0]
        if _tag(picture, _PLANAR) == 2 and _tag(picture, _BITS) > 8:
            raise DataError(
                f"{name}: a TIFF of more than 8 bits that holds its bands one after another, which "
                "PIL reads wrongly; save its bands interleaved"
            )
        turn = _tag(picture, _ORIENTATION)  # before PIL turns it
        picture.load()
        if not is_tiff:
            exif = exif or picture.info.get("exif")
            turn = orientation(exif) if isinstance(exif, bytes) else 1
        picture.info["rawmode"] = rawmode if isinstance(rawmode, str) else ""
        picture.info["orientation"] = turn if turn in range(1, 9) else 1
        return picture


def decode_colours(content: bytes, name: str, notes: Notes | None = None) -> Decoded:
    """As `decode_bytes`, in colour and turned; ``notes`` takes what is dropped.

    Raises:
        DataError: also for values whose range is not known.
    """
    picture = decode_bytes(content, name)
    if notes is not None:
        _note_dropped(picture, name, notes)
    with _decoding(name):  # some colour spaces cannot be converted
        pixels = _colours(picture, name)
    turn = picture.info["orientation"]
    return Decoded(pixels if picture.format == "TIFF" else turned(pixels, turn), turn)


def decode_pixels(content: bytes, name: str, notes: Notes | None = None) -> NDArray[np.uint8]:
    """As `decode_colours`: (H, W, 3) uint8."""
    return decode_colours(content, name, notes).pixels


def read_colours(file: Path, name: str | None = None, notes: Notes | None = None) -> Decoded:
    """As `decode_colours`, for a file."""
    name = name or str(file)
    return decode_colours(read_image_file(file, name), name, notes)


def read_pixels(
    file: Path, name: str | None = None, notes: Notes | None = None
) -> NDArray[np.uint8]:
    """As `decode_colours`, for a file: (H, W, 3) uint8."""
    return read_colours(file, name, notes).pixels


def picture_pixels(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    """As `decode_colours`, for a picture that PIL has opened: (H, W, 3) uint8."""
    check_pixels(*picture.size, name)
    tiles = getattr(picture, "tile", None)  # of a file that is not decoded yet
    place = tiles[0].args if tiles else picture.mode
    rawmode = place[0] if isinstance(place, tuple) and place else place
    with _decoding(name):
        picture.load()
        given = dict(picture.info)
        picture.info["rawmode"] = rawmode if isinstance(rawmode, str) else ""
        try:
            pixels = _colours(picture, name)
        finally:
            picture.info = given
    exif = given.get("exif")
    turn = orientation(exif) if isinstance(exif, bytes) else 1
    return pixels if picture.format == "TIFF" else turned(pixels, turn)  # PIL has turned a TIFF


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """The pixels (H, W, ...) as EXIF's orientation says."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _colours(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    mode, rawmode = picture.mode, picture.info["rawmode"]
    if mode in (*_GREY_16, "I", "F") or _tag(picture, _SIGNED) == 2:
        grey = _eight_bits(picture, name)
        return np.repeat(grey[..., None], 3, axis=2)
    picture.info.pop("transparency", None)  # with it, PIL warns of palettes
    if mode == "La":  # only this way can PIL convert it
        picture = picture.convert("LA")
    pixels = colours(picture)
    if ";16" in rawmode and pixels.max() <= _ALMOST_BLACK:
        raise _almost_black(name)
    return pixels


def _eight_bits(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    """Grey values of more than 8 bits, scaled by their range."""
    values, rawmode = np.array(picture), picture.info["rawmode"]
    top = 1.0
    if rawmode.startswith("I;12"):
        top = 4095
    elif rawmode.startswith("I;16") and not rawmode.endswith("S"):
        top = 65535
    elif picture.mode != "F":  # such as signed ones of 8 bits
        raise DataError(
            f"{name}: grey values in signed or 32-bit integers, whose range is not known; "
            "save it with 8 or 16 bits"
        )
    least, most = values.min(), values.max()
    if not (least >= 0 and most <= top):  # so is NaN
        raise DataError(
            f"{name}: fractions from {least:g} to {most:g}; save it with 8 or 16 bits, or scale "
            "its values to 0..1"
        )
    if 0 < most <= top * _ALMOST_BLACK / 255:
        raise _almost_black(name)
    if _tag(picture, _INVERTED) == 0:
        values = values.dtype.type(top) - values
    if picture.mode == "F":
        return np.rint(values * 255).astype(np.uint8)
    return np.rint(np.arange(top + 1) * (255 / top)).astype(np.uint8)[values]


def _almost_black(name: str) -> DataError:
    return DataError(
        f"{name}: of more than 8 bits, and almost black: its values end within 1/16 of their "
        "range; if it holds fewer bits (12 in 16), scale its values up, or else save it with 8 bits"
    )


def _note_dropped(picture: Image.Image, name: str, notes: Notes) -> None:
    if getattr(picture, "is_animated", False):
        notes.add("frames", f"{name}: holds several pictures, of which only the first is used")
    mode = picture.mode
    kept = 4 if mode == "CMYK" else 1 if mode in ("L", "LA", "La", "P", "PA") else 3
    bands = _tag(picture, _BANDS, len(picture.getbands()))
    what = f"bands {kept + 1} to {bands}" if bands > kept + 1 else f"band {bands}"
    if mode[-1] in "Aa" and bands == kept + 1:
        what += " (alpha)"
    if "transparency" in picture.info:
        what = "transparency"
    elif bands <= kept:
        return
    notes.add("bands", f"{name}: {what} dropped; its colours are used as they are stored")


def _tag(picture: Image.Image, tag: int, default: int = -1) -> int:
    """A number among a TIFF's tags; ``default`` in other formats."""
    value = getattr(picture, "tag_v2", {}).get(tag, default)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else default


def check_pixels(width: int, height: int, name: str) -> None:
    """Raises DataError for an image or a frame of more pixels than MAX_PIXELS."""
    pixels = width * height
    check_limit("MAX_PIXELS", pixels, f"{name}: {width}x{height} = {pixels:,} pixels", DataError)


@contextmanager
def _decoding(name: str, is_tiff: bool = False) -> Iterator[None]:
    """Turns what PIL raises into a DataError about the file ``name``."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise many kinds of errors
        raise _undecodable(name, error, is_tiff) from error


def mask_indices(picture: Image.Image, name: str) -> NDArray[np.integer]:
    """The indices (H, W) that a decoded mask holds; a palette's colours are not looked up.

    Raises:
        DataError: a mask in colour, of fractions, or in lossy compression.
    """
    if picture.format in ("JPEG", "MPO") or picture.info.get("compression") in _LOSSY:
        raise DataError(
            f"{name}: a mask in lossy compression, which changes class indices; save the original "
            "mask as PNG"
        )
    if picture.mode == "F":
        raise DataError(f"{name}: a mask of fractions; save class indices as a greyscale PNG")
    if picture.mode not in ("L", "P", "1", "I", *_GREY_16) or _tag(picture, _BANDS, 1) > 1:
        raise DataError(
            f"{name}: a colour mask ({picture.mode}); save class indices as a greyscale or "
            "palette PNG"
        )
    indices = np.array(picture)
    if picture.mode == "1":
        indices = indices.astype(np.uint8)
    elif picture.mode == "L" and _tag(picture, _SIGNED) == 2:
        indices = indices.view(np.int8)
    if stretch := _STRETCH.get(picture.info["rawmode"][:3]):
        indices //= stretch
    return indices if picture.format == "TIFF" else turned(indices, picture.info["orientation"])


def fit(
    image: Decoded,
    indices: NDArray[np.integer],
    name: str,
    label: str,
    notes: Notes | None = None,
) -> NDArray[np.uint8]:
    """The image's pixels, turned as its mask is.

    Args:
        image: the image.
        indices: (H, W) its mask.
        name, label: the names of both.
        notes: takes that a mask was made for the picture as it is stored, or may have been.

    Raises:
        DataError: they differ in size.
    """
    pixels, turn = image
    height, width = pixels.shape[:2]
    if indices.shape == (height, width):
        if notes is not None and (1 < turn <= 4 or (turn > 4 and height == width)):
            notes.add(
                "turned",
                f"{name}: turned as its EXIF says (orientation {turn}); its mask has the same size "
                "in any case, so look whether it fits (data check draws some), and if not, remove "
                "the orientation from the image",
            )
        return pixels
    if turn > 4 and indices.shape == (width, height):
        if notes is not None:
            notes.add(
                "not turned",
                f"{label}: is not turned as the EXIF of {name} says (orientation {turn}), so "
                "neither is the image",
            )
        return turned(pixels, {6: 8, 8: 6}.get(turn, turn))
    raise DataError(
        f"{label}: size {_size(indices.shape)} but {name} has {_size(pixels.shape[:2])}; "
        "a mask has its image's size"
    )


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, reversed(shape)))


def _undecodable(name: str, error: Exception | str, is_tiff: bool = False) -> DataError:
    reason = shorten(error)
    if isinstance(error, UnidentifiedImageError):  # its text names an object in memory
        reason = f"not an image file; expected {', '.join(FORMATS)}"
        if is_tiff:
            reason = "a damaged TIFF, or one with pixels of a kind that PIL does not know"
            return DataError(f"{name}: cannot be decoded ({reason}); save it as RGB with 8 bits")
    return DataError(f"{name}: cannot be decoded ({reason}); replace or remove it")


def torchvision_functional() -> Any:
    """torchvision.transforms.v2.functional. Raises ImportError that says what to do."""
    return extras.load("data.transforms", "torchvision.transforms.v2.functional")
