"""When each frame of an mp4 file is shown. OpenCV writes one rate for all, and tells no errors.

A file is a sequence of boxes: a size, a kind of four letters, and data or further boxes (ISO/IEC
14496-12). FFmpeg writes ``moov``, which describes the frames, last.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path

_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts")
_TIMES = (b"mvhd", b"tkhd", b"elst", b"mdhd", b"stts")
_TICKS = 90_000  # in a second; 1000 in a file of more than 13 hours
_LARGEST = 2**32


def is_whole(path: Path) -> bool:
    """Whether the file ends where its last box does, and describes its frames."""
    return any(kind == b"moov" for kind, _, _ in _boxes_of(path))


def set_times(path: Path, starts: Sequence[float], end: float) -> None:
    """Shows frame i from ``starts[i]`` to ``starts[i + 1]``, and the last one to ``end``.

    Args:
        path: a file with only these frames, in this order, as OpenCV writes it by FFmpeg. Another
            file stays as it is.
        starts: in seconds, rising from 0.
        end: in seconds.

    Raises:
        OSError: it cannot be written.
    """
    kind, offset, size = (_boxes_of(path) or [(b"", 0, 0)])[-1]
    with path.open("r+b") as file:
        file.seek(offset)
        moov = file.read(size)
        boxes = dict(_walk(moov)) if kind == b"moov" else {}
        tracks = sum(kind == b"trak" for kind, _ in _walk(moov))
        # Version 0 has times of 32 bits; ctts reorders frames.
        if tracks != 1 or b"ctts" in boxes or any(boxes.get(k, b"\1")[0] for k in _TIMES):
            return
        if sum(count for count, _ in struct.iter_unpack(">II", boxes[b"stts"][8:])) != len(starts):
            return
        rate = _TICKS if end * _TICKS < _LARGEST else 1000
        ticks = [round(time * rate) for time in (*starts, end)]
        runs = [
            (sum(1 for _ in run), length)
            for length, run in groupby(b - a for a, b in pairwise(ticks))
        ]
        (movie_rate,) = struct.unpack_from(">I", boxes[b"mvhd"], 12)
        duration = round(ticks[-1] * movie_rate / rate)
        changes = {
            b"mvhd": _with_numbers(boxes[b"mvhd"], 16, duration),
            b"tkhd": _with_numbers(boxes[b"tkhd"], 20, duration),
            b"elst": _with_numbers(boxes[b"elst"], 8, duration),
            b"mdhd": _with_numbers(boxes[b"mdhd"], 12, rate, ticks[-1]),
            b"stts": struct.pack(">II", 0, len(runs))
            + b"".join(struct.pack(">II", *r) for r in runs),
        }
        file.seek(offset)
        file.truncate()
        file.write(_rebuilt(moov, changes))


def _boxes_of(path: Path) -> list[tuple[bytes, int, int]]:
    """Kind, beginning and size of the outer boxes; none if the last one is cut off."""
    boxes, offset, end = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while offset < end:
            file.seek(offset)
            head = file.read(16).ljust(16, b"\0")
            size, kind, long = struct.unpack(">I4sQ", head)
            size = long if size == 1 else size
            if not 8 <= size <= end - offset:
                return []
            boxes.append((kind, offset, size))
            offset += size
    return boxes


def _split(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and data of each box."""
    offset = 0
    while offset < len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        yield kind, data[offset + 8 : offset + size]
        offset += size


def _walk(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and data of the boxes at all depths."""
    for kind, inner in _split(data):
        yield kind, inner
        if kind in _PARENTS:
            yield from _walk(inner)


def _rebuilt(data: bytes, changes: dict[bytes, bytes]) -> bytes:
    """The same boxes with other data for some kinds."""
    made = b""
    for kind, inner in _split(data):
        inner = _rebuilt(inner, changes) if kind in _PARENTS else changes.get(kind, inner)
        made += struct.pack(">I4s", 8 + len(inner), kind) + inner
    return made


def _with_numbers(data: bytes, offset: int, *numbers: int) -> bytes:
    packed = struct.pack(f">{len(numbers)}I", *numbers)
    return data[:offset] + packed + data[offset + len(packed) :]
