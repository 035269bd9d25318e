"""Old or new, never half."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mcibi_fast import files
from mcibi_fast.files import link_atomically, write_atomically, write_directory_atomically


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fsync)


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_directory_replaces_a_leftover(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    write_directory_atomically(path, {"a": b"1", "b": b"2"})
    write_directory_atomically(path, {"a": b"3"})
    assert [(p.name, p.read_bytes()) for p in path.iterdir()] == [("a", b"3")]
    assert list(tmp_path.iterdir()) == [path]


def test_file_on_a_full_disk(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_directory_on_a_full_disk(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "step-1"
    path.mkdir()
    (path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_directory_atomically(path, {"a": b"new"})
    assert (path / "a").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_link(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        link_atomically(tmp_path / "last", name)
        assert (tmp_path / "last").resolve().name == name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "x", "y"]
