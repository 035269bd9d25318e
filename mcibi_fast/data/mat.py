"""Reads MATLAB's .mat files (level 5, of MATLAB 5 to 7.2), as far as masks use them.

Arrays of numbers are read, at the top or in the fields of a structure; of everything else only the
sizes. A general reader creates whatever a few bytes announce, such as a billion cells; here nothing
is created that the file's own bytes do not fill.
"""

from __future__ import annotations

import struct
import zlib
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcibi_fast.data.errors import DataError
from mcibi_fast.limits import check_limit, limit

_HEADER = 128  # bytes; the last four are version and byte order
_MATRIX, _COMPRESSED = 14, 15  # kinds of elements
_NUMBERS = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip
_STRUCTURE, _NUMERIC = 2, range(6, 16)  # classes of arrays


class Matrix(NamedTuple):
    """An array: its name, class, sizes, and the bytes and byte order of its content."""

    name: str
    kind: int
    shape: tuple[int, ...]
    content: memoryview
    order: str

    @property
    def size(self) -> int:
        """The number of its entries."""
        return prod(self.shape)

    def whole_numbers(self) -> NDArray[np.integer]:
        """The entries, in the array's shape. Raises ValueError if they are not whole numbers."""
        if self.kind not in _NUMERIC:
            raise ValueError(f"{self.name}: no array of numbers")
        values = _Elements(self.content, self.order).numbers()
        if values.size != self.size:
            raise ValueError(f"{self.name}: {values.size} numbers in an array of {self.size}")
        with np.errstate(invalid="ignore"):  # what is not finite differs as well
            whole = values.astype(np.int64) if values.dtype.kind == "f" else values
        if not np.array_equal(whole, values):
            raise ValueError(f"{self.name}: numbers that are not whole")
        return whole.reshape(self.shape, order="F")

    def field(self, name: str) -> Matrix:
        """A field of a structure. Raises ValueError if this is no structure or lacks the field."""
        if self.kind != _STRUCTURE or self.size != 1:
            raise ValueError(f"{self.name}: no structure")
        elements = _Elements(self.content, self.order)
        (length,) = elements.integers()
        names = bytes(elements.next()[1])
        for start in range(0, len(names), max(length, 1)):
            _, matrix = elements.next()
            if names[start : start + length].split(b"\0")[0] == name.encode():
                return _matrix(_Elements(matrix, self.order))
        raise ValueError(f"{self.name}: no field {name}")


def read_variables(content: bytes, name: str) -> dict[str, Matrix]:
    """The arrays of a file, by their names.

    Args:
        content: the file's content.
        name: the file's name in error messages.

    Raises:
        ValueError: it is not such a file, or incomplete.
        DataError: it is larger, once decompressed, than the limit MAX_MAT_BYTES.
    """
    orders = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
    if content[_HEADER - 4 : _HEADER] not in orders:
        raise ValueError("not of MATLAB 5 to 7.2")
    elements = _Elements(memoryview(content)[_HEADER:], orders[content[_HEADER - 4 : _HEADER]])
    most = limit("MAX_MAT_BYTES")
    total, found = len(content), {}
    check_limit("MAX_MAT_BYTES", total, f"{name}: {total:,} bytes", DataError)
    while elements.more():
        kind, data = elements.next()
        if kind == _COMPRESSED:
            data = memoryview(zlib.decompressobj().decompress(data, most - total + 1))
            total += len(data)
            check_limit("MAX_MAT_BYTES", total, f"{name}: {total:,} bytes or more", DataError)
            kind, data = _Elements(data, elements.order).next()
        if kind == _MATRIX:
            matrix = _matrix(_Elements(data, elements.order))
            found[matrix.name] = matrix
    return found


class _Elements:
    """The data elements in some bytes, one after another; an element is a kind and its bytes."""

    def __init__(self, data: memoryview, order: str) -> None:
        self.data, self.order, self._at = data, order, 0

    def more(self) -> bool:
        return self._at < len(self.data)

    def rest(self) -> memoryview:
        return self.data[self._at :]

    def next(self) -> tuple[int, memoryview]:
        """The next element. Raises ValueError when it is cut short."""
        start, end = self._at + 8, len(self.data)
        if start > end:
            raise ValueError("cut short")
        kind, size = struct.unpack_from(self.order + "II", self.data, self._at)
        if kind >> 16:  # a small one: its size beside its kind, its bytes where the size would be
            kind, size, start, end = kind & 0xFFFF, kind >> 16, start - 4, start
        if start + size > end:
            raise ValueError("cut short")
        padding = 0 if kind == _COMPRESSED else -(start + size - self._at) % 8
        self._at = start + size + padding
        return kind, self.data[start : start + size]

    def integers(self) -> list[int]:
        """The integers of the next element. Raises ValueError when it has others."""
        numbers = self.numbers()
        if numbers.dtype.kind == "f":
            raise ValueError("fractions instead of integers")
        return numbers.tolist()

    def numbers(self) -> NDArray[Any]:
        """The numbers of the next element. Raises ValueError when it has none."""
        kind, data = self.next()
        if kind not in _NUMBERS:
            raise ValueError(f"an element of kind {kind} instead of numbers")
        return np.frombuffer(data, np.dtype(self.order + _NUMBERS[kind]))


def _matrix(elements: _Elements) -> Matrix:
    flags, shape = elements.integers(), tuple(elements.integers())
    name = bytes(elements.next()[1]).decode("latin-1")
    if not flags or min(shape, default=0) < 0:
        raise ValueError(f"{name}: no sizes")
    return Matrix(name, flags[0] & 0xFF, shape, elements.rest(), elements.order)
