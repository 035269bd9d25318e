"""What image files hold besides their pixels.

PIL reads it before the pixels, and makes objects of every number in it, although only one is asked
for here: how the picture is to be turned. So it is left out of JPEGs, and limited in TIFFs, whose
pixels are found by it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice

from mcibi_fast.data.errors import DataError
from mcibi_fast.limits import check_limit

_JPEG = b"\xff\xd8\xff"
_START_OF_SCAN = 0xDA
_EXIF, _EXIF_MARK = 0xE1, b"Exif\0\0"
_FIRST = 32  # segments; EXIF should be in the very first
# EXIF, previews, profiles, comments. JFIF's and Adobe's segments stay: they say what colours are.
_LEFT_OUT = {*range(0xE1, 0xEE), 0xEF, 0xFE}

_ORDERS = {b"II": "<", b"MM": ">"}
_UNITS = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a number of each kind; of the others, a text's, it is one."""
_POINTERS = (34665, 34853, 40965)  # tags of directories in a directory: EXIF, GPS, interoperability
_ORIENTATION, _SHORT = 274, 3  # a tag, and the kind of its number
_LEVELS = 3
_MOST_ENTRIES = 1 << 16


def pixels_alone(content: bytes) -> bytes:
    """The content of an image file; of a JPEG without segments that change no pixel."""
    if not content.startswith(_JPEG):
        return content
    parts, at = [content[:2]], 2
    for marker, start, at in _segments(content):
        if marker not in _LEFT_OUT:
            parts.append(content[start:at])
    return b"".join([*parts, content[at:]])


def exif_of_jpeg(content: bytes) -> bytes:
    """The EXIF of a JPEG; b"" if there is none among its first segments, or it is no JPEG."""
    if content.startswith(_JPEG):
        for marker, start, end in islice(_segments(content), _FIRST):
            if marker == _EXIF and content.startswith(_EXIF_MARK, start + 4):
                return content[start + 4 : end]
    return b""


def orientation(exif: bytes) -> int:
    """EXIF's orientation, 1 to 8; 1, as the pixels are stored, if there is none."""
    exif = exif.removeprefix(_EXIF_MARK)
    order = _ORDERS.get(exif[:2])
    if order is None or len(exif) < 8:
        return 1
    (place,) = struct.unpack_from(order + "L", exif, 4)
    for tag, kind, _, value in _entries(exif, place, order, False):
        if tag == _ORIENTATION:
            if kind == _SHORT:  # it stands at the beginning of four bytes
                value = value >> 16 if order == ">" else value & 0xFFFF
            return value if 1 <= value <= 8 else 1
    return 1


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment of a JPEG before its first scan."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker, size = content[at + 1], 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == _START_OF_SCAN or marker == 0xFF or 0xD0 <= marker <= 0xD9:
            break  # what follows is for the decoder
        yield marker, at, at + size
        at += size


def check_scans(content: bytes, name: str) -> None:
    """Raises DataError for a JPEG, its metadata left out, of more scans than MAX_SCANS.

    Each of them, a few bytes long, may go over all pixels.
    """
    if content.startswith(_JPEG):
        scans = content.count(bytes((0xFF, _START_OF_SCAN)))
        check_limit("MAX_SCANS", scans, f"{name}: {scans:,} scans", DataError)


def check_directories(content: bytes, name: str) -> None:
    """Raises DataError for a TIFF whose directories hold more numbers than MAX_TIFF_VALUES, or more
    bytes than the file: bytes that several entries share would be read for each of them.
    """
    order = _ORDERS.get(content[:2])
    if order is None or len(content) < 16:
        return
    is_big = content[2] == 43
    numbers = size = 0
    places = struct.unpack_from(order + ("Q" if is_big else "L"), content, 8 if is_big else 4)
    for _ in range(_LEVELS):
        pointers: list[int] = []
        for place in places:
            first: dict[int, int] = {}
            for tag, kind, count, value in _entries(content, place, order, is_big):
                numbers += count if kind in _UNITS else 0
                size += count * _UNITS.get(kind, 1)
                if tag in _POINTERS:
                    first.setdefault(tag, value)
            pointers += first.values()
        places = tuple(pointers)
    check_limit("MAX_TIFF_VALUES", numbers, f"{name}: {numbers:,} numbers of metadata", DataError)
    if size > len(content):
        raise DataError(f"{name}: {size:,} bytes of metadata in {len(content):,}; replace it")


def _entries(
    content: bytes, place: int, order: str, is_big: bool
) -> Iterator[tuple[int, int, int, int]]:
    """The entries of a directory: tag, kind, count, and value or the place of the values."""
    count = struct.Struct(order + ("Q" if is_big else "H"))
    entry = struct.Struct(order + ("HHQQ" if is_big else "HHLL"))
    start = place + count.size
    if start > len(content):
        return iter(())
    fitting = (len(content) - start) // entry.size
    entries = min(count.unpack_from(content, place)[0], fitting, _MOST_ENTRIES)
    return entry.iter_unpack(memoryview(content)[start : start + entries * entry.size])
