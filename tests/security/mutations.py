"""Damage to files: bits, numbers, pieces and words."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Sequence
from typing import Any

_NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 65535, 10**8, 2**31 - 1, 2**31, 2**32 - 1)
_WORDS = (
    *(b"../", b"/", b"\0", b"\n", b"\r", b"\x1b[2J", b"%d", b"{}", b"..", b"a" * 300),
    *(
        b"[" * 5000,
        b'{"a":' * 5000,
        b"null",
        b"true",
        b"NaN",
        b"1e999",
        b"-1",
        b"0.5",
        b'""',
        b"[]",
    ),
    *(
        b"1" + b"0" * 12,
        b"9" * 400,
        b"9" * 5000,
        b'"\\ud800"',
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"pipe:",
    ),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**8, 10**12, 2**63, 10**30, 0.5, 1e300, float("nan"), float("inf")),
    *("", "../x", "/x", "a\0b", "\ud800", "x" * 3000, [], {}, [[]], [1, 2, 3], {"a": 1}),
)


def mutate(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A damaged copy; ``others`` lend it pieces."""
    if content[:1] in (b"{", b"[") and rng.random() < 0.7:
        return mutate_json(content, rng)
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        rng.choice(_DAMAGES)(data, rng, others)
        del data[1 << 18 :]
    return bytes(data)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """JSON that is whole, or lines of it, with other values at one place or a few."""
    try:
        tree = json.loads(content)
    except ValueError:  # several lines
        lines = content.splitlines(keepends=True)
        i = rng.randrange(len(lines))
        return b"".join((*lines[:i], mutate_json(lines[i], rng), b"\n", *lines[i + 1 :]))
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            return rng.choice(_WORDS)
        parent, key = rng.choice(places)
        action = rng.random()
        if action < 0.6:
            parent[key] = copy.deepcopy(rng.choice(_VALUES))
        elif action < 0.75:
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(rng.choice((parent[key], *_VALUES))))
        else:
            parent[rng.choice(list(parent))] = copy.deepcopy(parent[key])
    return json.dumps(tree).encode()


def repair_png(content: bytes) -> bytes:
    """The same chunks with right checksums."""
    parts, at = [content[:8]], 8
    while at + 12 <= len(content):
        (size,) = struct.unpack_from(">I", content, at)
        body = content[at + 4 : at + 8 + size]
        if len(body) < 4 + size:
            break
        parts.append(content[at : at + 8 + size] + struct.pack(">I", zlib.crc32(body)))
        at += 12 + size
    return b"".join(parts) + content[at:]


def _places(tree: Any) -> Any:
    """Where a value stands in a tree: (its parent, its key)."""
    pending = [tree]
    while pending:
        node = pending.pop()
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in pairs:
            yield node, key
            if isinstance(value, (dict, list)):
                pending.append(value)


def _flip(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set_byte(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))


def _set_number(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    size = rng.choice((2, 4, 4, 8))
    if len(data) >= size:
        at = rng.randrange(len(data) - size + 1)
        number = (rng.choice(_NUMBERS) * rng.choice((1, 1, -1))) % (1 << 8 * size)
        data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))


def _cut(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _remove(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    start, end = _span(data, rng)
    del data[start:end]


def _repeat(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    start, end = _span(data, rng)
    data[end:end] = data[start:end] * rng.choice((1, 1, 3, 50))


def _overwrite(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    start, end = _span(data, rng)
    data[start:end] = rng.choice(
        (bytes(end - start), b"\xff" * (end - start), rng.randbytes(end - start))
    )


def _splice(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    start, end = _span(bytearray(other), rng)
    at = rng.randrange(len(data) + 1)
    data[at : at + rng.choice((0, end - start))] = other[start:end]


def _insert_word(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    at, word = rng.randrange(len(data) + 1), rng.choice(_WORDS)
    data[at : at + rng.choice((0, len(word)))] = word


_DAMAGES = (
    *(_flip, _set_byte, _set_number, _set_number, _cut, _remove, _repeat, _overwrite),
    *(_splice, _insert_word),
)


def _span(data: bytearray, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 16, 64, 1024)))
