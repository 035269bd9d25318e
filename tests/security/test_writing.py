"""Whatever stands in the way of an output, nothing is written outside of where it was asked for.

Temporary files have names that nobody can foresee, and links are replaced, never followed.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcibi_fast import files
from mcibi_fast.files import (
    append_line,
    link_atomically,
    make_folder,
    new_directory,
    new_file,
    private_file,
    write_atomically,
    write_directory_atomically,
)
from mcibi_fast.inference.predict import save_picture
from mcibi_fast.inference.video_io import VideoWriter
from mcibi_fast.training.run import Run
from mcibi_fast.training.scalars import ScalarLog

SECRET = b"untouched"
SEED = 0


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file that no output may reach."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "secret").write_bytes(SECRET)
    yield folder
    assert [p.name for p in folder.iterdir()] == ["secret"]
    assert (folder / "secret").read_bytes() == SECRET


def pixels() -> np.ndarray:
    return np.random.default_rng(SEED).integers(255, size=(16, 16, 3)).astype(np.uint8)


def write_directory(path: Path) -> None:
    write_directory_atomically(path, {"a": b"1"})


def write_new_directory(path: Path) -> None:
    with new_directory(path) as folder:
        (folder / "a").write_bytes(b"1")


def write_video(path: Path) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV")
    writer = VideoWriter(path, 5.0)
    writer.add(pixels())
    writer.close()


WRITERS: dict[str, Callable[[Path], None]] = {
    "file": lambda path: write_atomically(path, b"new"),
    "picture": lambda path: save_picture(Image.fromarray(pixels()), path, below=path.parent),
    "video": write_video,
    "directory": write_directory,
    "link": lambda path: link_atomically(path, "target"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_link_in_the_way_is_replaced(kind: str, tmp_path: Path, elsewhere: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, target in {
        "to_file.mp4": "secret",
        "to_folder.mp4": ".",
        "to_nothing.mp4": "x",
    }.items():
        (out / name).symlink_to(elsewhere / target)
        WRITERS[kind](out / name)
        assert (out / name).is_symlink() == (kind == "link")
        if kind == "link":
            assert os.readlink(out / name) == "target"
        else:
            assert (out / name).is_dir() == (kind == "directory")
    assert len(list(out.iterdir())) == 3


@pytest.mark.parametrize("kind", [*WRITERS, "new directory"])
def test_temporary_names_cannot_be_foreseen(
    kind: str, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links wait under the names that were used before, and under those of another run."""
    used: list[Path] = []
    claim = files._temporary
    monkeypatch.setattr(files, "_temporary", lambda path: used.append(claim(path)) or used[-1])
    write = WRITERS.get(kind, write_new_directory)
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name in (".out.mp4.tmp", ".out.tmp.mp4", *(path.name for path in used)):
            (folder / name).symlink_to(elsewhere / "secret")
        write(folder / "out.mp4")
        assert not (folder / "out.mp4").is_symlink() or kind == "link"
    assert len({path.name for path in used}) == 2
    assert all(re.fullmatch(r"\.mcibi_fast-[0-9a-f]{16}\.tmp", path.name) for path in used)


@pytest.mark.parametrize("kind", [*WRITERS, "new directory"])
def test_even_a_name_that_was_foreseen_is_not_followed(
    kind: str, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / ".mcibi_fast-0123456789abcdef.tmp"
    monkeypatch.setattr(files, "_temporary", lambda path: temporary)
    for target in ("secret", ".", "x"):
        temporary.symlink_to(elsewhere / target)
        with pytest.raises(FileExistsError):
            WRITERS.get(kind, write_new_directory)(tmp_path / "out.mp4")
        temporary.unlink(missing_ok=True)
    assert not (tmp_path / "out.mp4").exists()


def test_folders_of_outputs_are_not_links(tmp_path: Path, elsewhere: Path) -> None:
    """A link below the folder that the user named is replaced; that folder itself may be a link."""
    real, out = tmp_path / "real", tmp_path / "out"
    real.mkdir()
    out.symlink_to(real)
    (real / "labels").symlink_to(elsewhere)
    save_picture(Image.fromarray(pixels()), out / "labels" / "deep" / "a.png", below=out)
    assert (real / "labels" / "deep" / "a.png").is_file()
    (real / "labels" / "deep" / "a.png").unlink()
    (real / "labels" / "deep").rmdir()
    (real / "labels" / "deep").symlink_to(elsewhere)
    make_folder(out / "labels" / "deep", below=out)
    assert not (real / "labels" / "deep").is_symlink() and out.is_symlink()


def test_the_history_is_not_appended_to_through_a_link(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "history.jsonl").symlink_to(elsewhere / "secret")
    with pytest.raises(OSError, match=r"history\.jsonl"):
        append_line(tmp_path / "history.jsonl", "{}")
    with pytest.raises(OSError, match=r"history\.jsonl"):
        Run(tmp_path).record(step=1)
    os.unlink(tmp_path / "history.jsonl")
    os.mkfifo(tmp_path / "history.jsonl")
    with pytest.raises(OSError, match=r"history\.jsonl"):
        append_line(tmp_path / "history.jsonl", "{}")


def test_tensorboard_is_not_written_through_a_link(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "tensorboard").symlink_to(elsewhere)
    ScalarLog(tmp_path / "tensorboard").close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_permissions_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"")
        write_video(tmp_path / "video.mp4")
        write_directory(tmp_path / "folder")
        append_line(tmp_path / "lines", "x")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {
        "file": 0o666 & ~umask,
        "video.mp4": 0o666 & ~umask,
        "lines": 0o666 & ~umask,
        "folder": 0o777 & ~umask,
    }


def test_errors_name_the_output_and_leave_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: .*out"),
        new_file(tmp_path / "out"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(RuntimeError), new_directory(tmp_path / "out"):
        raise RuntimeError
    with pytest.raises(RuntimeError), private_file(tmp_path / "out") as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_atomically(tmp_path / "nowhere" / "file", b"")


KILLED = """
import os, signal, sys
from pathlib import Path
from mcibi_fast import files

folder = Path(sys.argv[1])
with files.new_file(folder / "a") as file, files.new_directory(folder / "b") as inner:
    (inner / "c").write_bytes(b"half")
    print("ready", flush=True)
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def start(folder: Path, what: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(
    tmp_path: Path, elsewhere: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert start(out, "dies").wait(30) == -signal.SIGKILL
    left = {path.name for path in out.iterdir()}
    assert len(left) == 2
    writing = start(out, "waits")
    assert len(list(out.iterdir())) in (2, 4)  # the second process may have tidied up already
    (out / ".mcibi_fast-0123456789abcdef.tmp").symlink_to(elsewhere)
    (out / ".mine.tmp").write_bytes(b"")
    write_atomically(out / "x", b"")
    names = {path.name for path in out.iterdir()}
    assert not left & names and {"x", ".mine.tmp"} < names and len(names) == 5
    writing.communicate("", timeout=30)
    assert writing.returncode == 0
    assert {"a", "b"} < {path.name for path in out.iterdir()}


def test_many_processes_write_one_file(tmp_path: Path) -> None:
    """No one takes another's new file for a leftover, and each result is whole."""

    def write(content: bytes) -> None:
        for _ in range(50):
            files._remove_leftovers.cache_clear()
            write_atomically(tmp_path / "file", content)
            write_new_directory(tmp_path / f"folder_{secrets.token_hex(8)}")

    contents = [bytes([65 + i]) * 10_000 for i in range(4)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, contents))
    assert (tmp_path / "file").read_bytes() in contents
    assert len(list(tmp_path.glob("folder_*"))) == 200 == len(list(tmp_path.iterdir())) - 1


def test_a_folder_of_many_outputs_is_looked_through_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[object] = []
    scandir = os.scandir
    monkeypatch.setattr(files.os, "scandir", lambda path: scans.append(path) or scandir(path))
    for i in range(20):
        save_picture(Image.new("L", (1, 1)), tmp_path / f"{i}.png", below=tmp_path)
    assert len(scans) == 1
    assert len(list(tmp_path.iterdir())) == 20
