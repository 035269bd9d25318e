"""Zip files and .mat files that are small and ask for much."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from mcibi_fast.data import ADE20K, LIP, VOC, COCOStuff, DataError
from mcibi_fast.data.archives import Files
from mcibi_fast.data.mat import read_variables
from tests.data import trees
from tests.security import attacks
from tests.security.forked import Outcome, bounded, refused


def deflated(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def check(dataset: str, root: Path, **limits: int) -> str:
    return refused("data", "check", dataset, root, "--out", root.parent / "out", **limits)


# The directory of a zip file


@pytest.mark.parametrize("levels", [33, 32_700])
def test_names_of_many_levels(tmp_path: Path, levels: int) -> None:
    """A zip file of one such name used to take 40 seconds and 4.8 GB."""
    members = dict.fromkeys((f"{i}" + "/a" * levels for i in range(50)), b"")
    path = deflated(tmp_path / "lip.zip", members)
    error = check("lip", path, seconds=10, megabytes=150)
    assert f"lip.zip: {levels:,} folders in each other, more than MAX_ZIP_LEVELS (32)" in error


def test_as_many_levels_as_allowed(tmp_path: Path) -> None:
    path = deflated(tmp_path / "x.zip", {"a/" * 32 + "x.txt": b"name"})
    files = Files(path)
    assert files.lines(files.locate("x.txt")) == ["name"]


def test_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = deflated(tmp_path / "lip.zip", {f"{i}": b"" for i in range(200)})
    monkeypatch.setenv("MCIBI_FAST_MAX_ZIP_ENTRIES", "200")
    with pytest.raises(DataError, match=r"201 entries, more than MAX_ZIP_ENTRIES \(200\)"):
        Files(path)
    monkeypatch.setenv("MCIBI_FAST_MAX_ZIP_ENTRIES", "201")  # with the top
    Files(path)


def test_folders_that_only_names_make_count_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = deflated(tmp_path / "lip.zip", {f"{i}/a/a/a/a/a/a/a": b"" for i in range(100)})
    monkeypatch.setenv("MCIBI_FAST_MAX_ZIP_ENTRIES", "500")
    with pytest.raises(DataError, match=r"lip\.zip: 50\d entries, more than MAX_ZIP_ENTRIES"):
        Files(path)


def test_a_large_directory_is_not_read(tmp_path: Path) -> None:
    """300 MB of members without a name, which would be 6 million objects: 5 GB."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", *[0] * 18)
    count = 300_000_000 // len(entry)
    path = tmp_path / "lip.zip"
    with path.open("wb") as file:
        for _ in range(count // 100_000):
            file.write(entry * 100_000)
        size = file.tell()
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, size, 0, 0))
    error = check("lip", path, megabytes=150)
    assert "room for 2,3" in error and "more than MAX_ZIP_ENTRIES (1,000,000)" in error


@pytest.mark.parametrize("kind", ["fifo", "endless", "terabyte", "socket"])
@pytest.mark.parametrize("within", [False, True], ids=["itself", "in a folder"])
def test_zip_files_that_are_none(tmp_path: Path, kind: str, within: bool) -> None:
    make, reason = attacks.NO_IMAGES[kind]
    folder = tmp_path / "root"
    folder.mkdir()
    make(folder / "lip.zip")
    error = check("lip", folder if within else folder / "lip.zip", megabytes=100)
    if within and kind != "terabyte":
        assert f"lip.zip: not a whole zip file ([Errno 22] {reason}" in error
    else:
        assert "lip.zip: no" in error


# Members


@pytest.mark.parametrize(
    ("large", "size", "limit"),
    [("val_id.txt", 1 << 26, "MAX_TEXT_BYTES"), ("val_images/a.jpg", 9 << 25, "MAX_FILE_BYTES")],
)
def test_a_large_member(tmp_path: Path, large: str, size: int, limit: str) -> None:
    """The member consists of zeros, which compress to a thousandth of their size."""
    path = tmp_path / "lip.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(large, "w") as member:
            for _ in range(size >> 20):
                member.write(bytes(1 << 20))
        others = {"val_images/a.jpg": b"", "val_segmentations/a.png": b"", "val_id.txt": b"a"}
        for name, content in others.items():
            if name != large:
                archive.writestr(name, content)
    assert path.stat().st_size < size / 900

    def read() -> None:
        LIP(path, "val").read(0)

    error = bounded(read, megabytes=50).error
    assert f"lip.zip/{large}: {size:,} bytes, more than {limit}" in error


def test_a_member_larger_than_it_announces(tmp_path: Path) -> None:
    """1 GiB that says it is 100 bytes: no more is made of it than a block."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = b"".join(packer.compress(bytes(1 << 24)) for _ in range(64)) + packer.flush()
    path = deflated(tmp_path / "x.zip", {"x.txt": os.urandom(len(data))}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    start = content.index(b"x.txt") + len(b"x.txt")
    content[start : start + len(data)] = data
    for signature, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        place = content.index(signature)
        struct.pack_into("<H", content, place + at, zipfile.ZIP_DEFLATED)
        struct.pack_into("<LLL", content, place + at + 6, zlib.crc32(bytes(100)), len(data), 100)
    path.write_bytes(content)

    def read() -> int:
        files = Files(path)
        return len(files.read(files.locate("x.txt")))

    assert bounded(read, megabytes=100) == Outcome(100, "", "", "")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_without_a_bound(tmp_path: Path, method: int) -> None:
    """bzip2 makes gigabytes of a few hundred bytes, whatever the member announces."""
    path = deflated(tmp_path / "x.zip", {"x.txt": bytes(1 << 28)}, method)
    content = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<L", content, content.index(signature) + at, 100)
    path.write_bytes(content)

    def read() -> int:
        files = Files(path)
        return len(files.read(files.locate("x.txt")))

    error = bounded(read, megabytes=100).error
    assert error.startswith("DataError: x.zip/x.txt: is not compressed by deflate")


def test_the_same_bytes_in_many_members(tmp_path: Path) -> None:
    """Members that overlap are read one by one, each within its limit."""
    tree = trees.ade20k(tmp_path / "ade")
    path = trees.pack(tree, tmp_path / "ade.zip")
    assert len(ADE20K(path, "train")) == 2
    content = bytearray(path.read_bytes())
    place = [i for i in range(len(content)) if content.startswith(b"PK\x01\x02", i)]
    first = content[place[0] + 42 : place[0] + 46]
    for at in place:
        content[at + 42 : at + 46] = first
    path.write_bytes(content)
    assert "cannot be read" in check("ade20k", path)


@pytest.mark.parametrize("nested", ["images", "lists", "whole"])
def test_zip_files_in_zip_files(tmp_path: Path, nested: str) -> None:
    """Zip files inside a zip file are ordinary members: nothing unpacks them."""
    inner = trees.pack(trees.lip(tmp_path / "lip"), tmp_path / "inner.zip").read_bytes()
    members = {
        p.relative_to(tmp_path / "lip").as_posix(): p for p in (tmp_path / "lip").rglob("*.*")
    }
    content = {name: path.read_bytes() for name, path in members.items()}
    if nested == "images":
        content["val_images/100034_483681.jpg"] = inner
    elif nested == "lists":
        content["val_id.txt"] = inner
    else:
        content = {"lip.zip": inner}
    error = check("lip", deflated(tmp_path / "outer.zip", content))
    expected = {
        "images": "not an image file",
        "lists": "not a text file",
        "whole": "no train_images",
    }
    assert expected[nested] in error


# .mat files

HEAD = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix(kind: int, sizes: tuple[int, ...], *content: bytes, name: bytes = b"S") -> bytes:
    dimensions = struct.pack(f"<{len(sizes)}i", *sizes)
    head = element(6, struct.pack("<II", kind, 0)) + element(5, dimensions) + element(1, name)
    return element(14, head + b"".join(content))


def packed(content: bytes, zeros: int = 0) -> bytes:
    """A compressed element of ``content`` and zeros."""
    packer = zlib.compressobj(9)
    parts = [content, *(bytes(min(1 << 20, zeros - at)) for at in range(0, zeros, 1 << 20))]
    data = b"".join(map(packer.compress, parts)) + packer.flush()
    return struct.pack("<II", 15, len(data)) + data


LARGE = (2**31 - 1, 2**20)
NO_FIELDS = element(5, struct.pack("<i", 32)) + element(1, b"")
ONE_FIELD = element(5, struct.pack("<i", 32)) + element(1, b"Segmentation".ljust(32, b"\0"))
MATS = {
    # scipy makes each of these: 400 MB of 389 kB, 4 GB of 184 bytes, and so on
    "compressed": (packed(b"", 1 << 28), "more than MAX_MAT_BYTES"),
    "compressed often": (packed(element(1, b""), 1 << 25) * 5, "more than MAX_MAT_BYTES"),
    "cells": (matrix(1, (2**27, 4)), "no array of numbers"),
    "text": (matrix(4, (2**31 - 1, 1), element(2, b"")), "no array of numbers"),
    "structures": (matrix(2, LARGE, NO_FIELDS), "no array of numbers"),
    "structures with fields": (matrix(2, (2**29, 2), ONE_FIELD), "no array of numbers"),
    "sparse": (matrix(5, LARGE, element(5, b""), element(5, b""), element(9, b"")), "no array of"),
    "numbers": (matrix(9, LARGE, element(2, b"abc")), "3 numbers in an array of"),
    "negative sizes": (matrix(9, (-3, -1), element(2, b"abc")), "no sizes"),
    "no sizes": (matrix(9, (), element(2, b"abc")), "3 numbers in an array of 1"),
    "longer than the file": (element(14, b"")[:4] + b"\xff\xff\xff\x7f", "cut short"),
    "not whole": (matrix(6, (2, 1), element(9, struct.pack("<2d", 0.5, np.nan))), "not whole"),
    "infinite": (matrix(6, (1, 1), element(9, struct.pack("<d", np.inf))), "not whole"),
    "another kind": (matrix(6, (2, 1), element(16, b"ab")), "of kind 16 instead of numbers"),
    "nothing": (b"", "no S in it"),
    "half a stream": (packed(bytes(1000))[:-6] + b"\0\0", ""),
}


@pytest.mark.parametrize("attack", MATS)
@pytest.mark.parametrize("order", ["as it is", "compressed"])
@pytest.mark.thinned
def test_mat_files_of_coco_stuff(tmp_path: Path, attack: str, order: str) -> None:
    content, message = MATS[attack]
    if order == "compressed" and content and "compress" not in attack:
        content = packed(content)
    root = trees.coco_stuff(tmp_path / "root")
    name = "COCO_train2014_000000000081"
    (root / f"annotations/{name}.mat").write_bytes(HEAD + content)
    error = check("coco_stuff", root, seconds=15, megabytes=400)
    assert f"{name}.mat: " in error and message in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (matrix(2, LARGE, ONE_FIELD, name=b"GTcls"), "no GTcls.Segmentation in it"),
        (matrix(2, (1, 1), NO_FIELDS, name=b"GTcls"), "no GTcls.Segmentation in it"),
        (
            matrix(2, (1, 1), ONE_FIELD, matrix(9, LARGE, element(2, b"a")), name=b"GTcls"),
            "no GTcls.Segmentation in it",
        ),
        (
            matrix(2, (1, 1), ONE_FIELD, matrix(9, (1, 3), element(2, b"abc")), name=b"GTcls"),
            "size 3x1 but",
        ),
        (
            matrix(2, (1, 1), ONE_FIELD, matrix(9, (3,), element(2, b"abc")), name=b"GTcls"),
            "size 3 but",
        ),
    ],
)
def test_mat_files_of_sbd(tmp_path: Path, content: bytes, message: str) -> None:
    root = trees.voc(tmp_path / "root")
    (root / "benchmark_RELEASE/dataset/cls/s.mat").write_bytes(HEAD + content)
    error = check("voc", root, seconds=15, megabytes=200)
    assert "cls/s.mat: " in error and message in error


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "i4", "f4", "f8", "i8", "u8"])
@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_are_read_as_scipy_writes_them(dtype: str, compressed: bool) -> None:
    expected = np.arange(12, dtype=dtype).reshape(3, 4)
    buffer = BytesIO()
    content = {"S": expected, "t": {"x": 5, "y": expected.T}, "names": np.array(["a"] * 7, object)}
    savemat(buffer, content, do_compression=compressed)
    found = read_variables(buffer.getvalue(), "x.mat")
    assert np.array_equal(found["S"].whole_numbers(), expected)
    assert np.array_equal(found["t"].field("y").whole_numbers(), expected.T)
    assert found["names"].size == 7
    with pytest.raises(ValueError, match="no field z"):
        found["t"].field("z")


def test_the_other_byte_order() -> None:
    def swapped(kind: int, content: bytes) -> bytes:
        return struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)

    body = swapped(6, struct.pack(">II", 11, 0)) + swapped(5, struct.pack(">2i", 1, 2))
    body += struct.pack(">HH", 1, 1) + b"S\0\0\0" + swapped(4, struct.pack(">2H", 1, 515))
    content = HEAD[:124] + b"\x01\x00MI" + swapped(14, body)
    assert read_variables(content, "x.mat")["S"].whole_numbers().tolist() == [[1, 515]]


@pytest.mark.parametrize(
    "content", [b"", b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM", b"x" * 500]
)
def test_other_versions(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"not of MATLAB 5 to 7\.2"):
        read_variables(content, "x.mat")


def test_the_environment_raises_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = trees.coco_stuff(tmp_path / "root")
    monkeypatch.setenv("MCIBI_FAST_MAX_MAT_BYTES", "300")
    with pytest.raises(DataError, match="more than MAX_MAT_BYTES"):
        COCOStuff(root, "test").read(0)
    monkeypatch.setenv("MCIBI_FAST_MAX_MAT_BYTES", "100000")
    COCOStuff(root, "test").read(0)
    assert VOC(trees.voc(tmp_path / "voc"), "trainaug").read(0)
