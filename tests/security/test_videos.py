"""Video files that are none, list others, or have frames that are too large."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mcibi_fast.inference.video_io import open_frames
from tests.security import attacks, places
from tests.security.forked import bounded, refused

cv2 = pytest.importorskip("cv2", reason="needs OpenCV to write a video")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return places.checkpoint(tmp_path_factory.mktemp("model") / "model.safetensors")


def write_video(path: Path, code: str = "mp4v") -> Path:
    path.parent.mkdir(exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 25, (64, 48))
    for i in range(5):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()
    return path


def video(checkpoint: Path, source: Path) -> str:
    options = ("--out", source.parent / "out", "--no-overlay", "--cpu", "--quiet")
    return refused("video", checkpoint, source, *options)


@pytest.mark.parametrize("kind", ["fifo", "endless", "socket"])
@pytest.mark.parametrize("name", ["x.mp4", "x.png", "7"])
def test_what_is_no_file(checkpoint: Path, tmp_path: Path, kind: str, name: str) -> None:
    make, reason = attacks.NO_IMAGES[kind]
    make(tmp_path / name)
    error = video(checkpoint, tmp_path / name)
    assert reason in error and name in error


def test_links_to_videos_are_followed(tmp_path: Path) -> None:
    os.symlink(write_video(tmp_path / "elsewhere/x.mp4"), tmp_path / "x.mp4")
    assert len(list(open_frames(str(tmp_path / "x.mp4")))) == 5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n"),
        (
            "x.m3u8",
            "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        ),
        ("x.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:1/\n"),
        ("x.mp4", "ffconcat version 1.0\nfile secret/x.ts\n"),
        ("x.mp4", "ffconcat version 1.0\nfile {secret}\n"),
        (
            "x.sdp",
            "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
            "m=video 5004 RTP/AVP 26\n",
        ),
    ],
)
def test_lists_of_other_files(checkpoint: Path, tmp_path: Path, name: str, text: str) -> None:
    secret = write_video(tmp_path / "secret/x.ts", "mpg2")
    assert len(list(open_frames(str(secret)))) == 5
    (tmp_path / name).write_text(text.format(secret=secret))
    assert "is no video that OpenCV can read" in video(checkpoint, tmp_path / name)


def test_a_name_that_is_a_pattern(checkpoint: Path, tmp_path: Path) -> None:
    """FFmpeg and OpenCV take %d in a name for the numbers of pictures beside it."""
    for i in range(3):
        (tmp_path / f"x{i}.png").write_bytes(attacks.png(64, 48))
    (tmp_path / "x%d.img").write_text("nothing")
    (tmp_path / "x%1d.png.x").write_text("nothing")
    assert "is no video" in video(checkpoint, tmp_path / "x%d.img")
    assert "is no video" in video(checkpoint, tmp_path / "x%1d.png.x")


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.avi", "x.mov", "x.ts", "x.webm"])
def test_videos_are_read(tmp_path: Path, name: str) -> None:
    codes = {"x.avi": "MJPG", "x.ts": "mpg2", "x.webm": "VP80"}
    path = write_video(tmp_path / name, codes.get(name, "mp4v"))
    assert len([f for f in open_frames(str(path)) if f.pixels is not None]) == 5


def test_large_frames(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "x.mp4")
    monkeypatch.setenv("MCIBI_FAST_MAX_PIXELS", "3071")
    message = "x.mp4: 64x48 = 3,072 pixels, more than MAX_PIXELS (3,071); set MCIBI_FAST_MAX_PIXELS"
    assert message in video(checkpoint, path)
    monkeypatch.setenv("MCIBI_FAST_MAX_PIXELS", "3072")
    assert len(list(open_frames(str(path)))) == 5


@pytest.mark.parametrize("before", [None, "threads;1"])
def test_the_environment_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", raising=False)
    if before:
        monkeypatch.setenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", before)
    assert len(list(open_frames(str(write_video(tmp_path / "x.mp4"))))) == 5
    assert os.environ.get("OPENCV_FFMPEG_CAPTURE_OPTIONS") == before


def test_a_terabyte(tmp_path: Path) -> None:
    attacks.make_sparse(tmp_path / "x.mp4")
    error = bounded(open_frames, str(tmp_path / "x.mp4"), megabytes=300).error
    assert error.startswith("ValueError: ") and "is no video" in error
