"""Files that ask for more than they give, or are none."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def png(width: int, height: int) -> bytes:
    """A black PNG of one bit per pixel, made without its pixels: 8,890 x 8,890 are 9.7 kB."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, body) for kind, body in chunks)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, of a few bytes, comes many times."""
    good = encoded("JPEG", progressive=True, quality=5)
    last = good[good.rindex(b"\xff\xda") : -2]
    return good[:-2] + last * count + good[-2:]


def tiff(*entries: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    """A grey TIFF of 16x16 with further entries (tag, kind, count, value or place of the values).

    Args:
        entries: instead of those of the same tags.
        data: what stands from byte 8 on; the pixels are at its beginning.
    """
    directory = {
        256: (4, 1, 16), 257: (4, 1, 16), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1),
        273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, 16), 279: (4, 1, 256),
    }  # fmt: skip
    directory |= {tag: rest for tag, *rest in entries}  # type: ignore[misc]
    data += bytes(max(256 - len(data), 0) + len(data) % 2)
    body = b"".join(struct.pack("<HHII", tag, *rest) for tag, rest in sorted(directory.items()))
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(directory)) + body + bytes(4)


def encoded(form: str, **options: object) -> bytes:
    """A small picture in one of PIL's formats."""
    buffer = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def make_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(before)


def make_sparse(path: Path, size: int = 1 << 40) -> None:
    """A file of a terabyte that takes no room on the disk."""
    path.touch()
    os.truncate(path, size)


# What stands where an image or a mask should be, and what the error says of it.
NO_IMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pixels": (write(png(8890, 8890)), "8890x8890 = 79,032,100 pixels, more than MAX_PIXELS"),
    "scans": (write(scans(2000)), " scans, more than MAX_SCANS (1,000)"),
    "numbers": (
        write(tiff((700, 3, 2 << 20, 8), data=bytes(4 << 20))),
        "2,097,161 numbers of metadata, more than MAX_TIFF_VALUES",
    ),
    "eps": (write(encoded("EPS")), "not an image file; expected BMP, JPEG, PNG, TIFF, WEBP"),
    "fifo": (os.mkfifo, "a FIFO, not a regular file"),
    "endless": (lambda path: os.symlink("/dev/zero", path), "a device, not a regular file"),
    "socket": (make_socket, "a socket, not a regular file"),
    "folder": (os.mkdir, "a folder, not a file"),
    "terabyte": (make_sparse, "1,099,511,627,776 bytes, more than MAX_FILE_BYTES"),
}
