"""Reads frames from a video file, a camera or a folder, and writes a video of the results."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcibi_fast import extras
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.images import IMAGE_SUFFIXES, check_pixels, read_pixels
from mcibi_fast.data.listing import distinct_names, list_images
from mcibi_fast.data.notes import Notes
from mcibi_fast.files import naming, private_file
from mcibi_fast.inference import mp4
from mcibi_fast.terminal import warn
from mcibi_fast.untrusted import open_regular

Pixels = NDArray[np.uint8]

# FFmpeg's names of the formats that are read: others list further files or addresses (HLS, concat,
# SDP, a pattern of images' names).
VIDEO_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif"
_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"

FOLDER_FPS = 25.0  # pictures do not say how fast they follow each other
_FAILURES = 50  # reads in a row that may fail before a file or a camera is given up
_SLACK = 2  # frames by which a file's own number may be wrong


@dataclass(frozen=True)
class ReadFrame:
    """A frame: its name and pixels (H, W, 3) RGB, or None and what is wrong with it.

    ``time`` is when it is shown, in seconds after the first frame.
    """

    name: str
    pixels: Pixels | None
    problem: str = ""
    time: float = 0.0


class Frames:
    """Frames in order, each read when it is asked for; to be closed.

    Attributes:
        fps: frames per second of the frames that are returned, on average.
        total: their number, if it is known; a damaged file may have fewer.
        ending: after the last frame, why there are no more if that may be a fault, otherwise "".
        end: after the last frame, until when it is shown, if that is known.
    """

    fps: float
    total: int | None
    ending: str = ""
    end: float | None = None

    def __iter__(self) -> Iterator[ReadFrame]:
        raise NotImplementedError

    def close(self) -> None:
        """Releases the file or the camera."""


def open_frames(source: str, *, every: int = 1) -> Frames:
    """Opens a folder of pictures, a video file, or a camera.

    Args:
        source: a path; or the number of a camera, if no file has that name.
        every: take one frame out of this many.

    Raises:
        FileNotFoundError: there is no such file or folder.
        OSError: it is something else, such as a FIFO.
        ValueError: ``every`` is not positive, the folder holds no pictures, the file is no video,
            the camera cannot be opened, or OpenCV is missing (folders do without).
    """
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    path = Path(source)
    if path.is_dir():
        return FolderFrames(path, every=every)
    if path.exists():
        open_regular(path).close()
        if path.suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(f"{source}: is a picture; mcibi-fast predict takes pictures")
        return CapturedFrames(str(path), every=every)
    if source.isdecimal():
        return CapturedFrames(int(source), every=every)
    raise FileNotFoundError(f"{source}: there is no such video, folder or camera")


class FolderFrames(Frames):
    """The pictures in a folder, sorted by name, with numbers in names as numbers.

    Args:
        folder: the folder; pictures in its subfolders are not taken.
        every: take one picture out of this many.
    """

    def __init__(self, folder: Path, *, every: int = 1) -> None:
        found = list_images(folder, nested=False)
        left_out = found.describe(hidden=False)
        if not found.paths:
            more = f"; left out {left_out}" if left_out else ""
            raise ValueError(
                f"{folder}: holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}){more}"
            )
        if left_out:
            warn(f"{folder}: left out {left_out}")
        pictures = sorted((folder / path for path in found.paths), key=_natural)
        names = distinct_names([path.name for path in pictures])
        self.pictures = list(zip(pictures, names, strict=True))[::every]
        self.fps, self.total = FOLDER_FPS / every, len(self.pictures)

    def __iter__(self) -> Iterator[ReadFrame]:
        notes = Notes()
        for index, (path, name) in enumerate(self.pictures):
            try:
                yield ReadFrame(name, read_pixels(path, notes=notes), time=index / self.fps)
            except DataError as error:
                yield ReadFrame(name, None, str(error))
        self.end = len(self.pictures) / self.fps


class CapturedFrames(Frames):
    """The frames that OpenCV reads from a video file or a camera, named by their number from 0.

    FFmpeg hides damage within a frame if it can. A file ends when nothing more can be read;
    `ending` says so if the file announced more frames (it was cut off, or its sound is longer).

    Args:
        source: a file, or a camera's number.
        every: take one frame out of this many.
    """

    def __init__(self, source: str | int, *, every: int = 1) -> None:
        self.cv2 = opencv("video files and cameras")
        self.every, self.is_camera = every, isinstance(source, int)
        self.capture = self.cv2.VideoCapture(source) if self.is_camera else self._file(source)
        if not self.capture.isOpened():
            what = f"camera {source}: is not there or in use" if self.is_camera else (
                f"{source}: is no video that OpenCV can read, or it is damaged"
            )  # fmt: skip
            raise ValueError(what)
        self.name = f"camera {source}" if self.is_camera else Path(str(source)).name
        width = int(self.capture.get(self.cv2.CAP_PROP_FRAME_WIDTH))
        height = int(self.capture.get(self.cv2.CAP_PROP_FRAME_HEIGHT))
        check_pixels(width, height, self.name)
        fps = self.capture.get(self.cv2.CAP_PROP_FPS)
        self.source_fps = fps if 0 < fps < 1000 else FOLDER_FPS
        self.fps = self.source_fps / every
        count = 0 if self.is_camera else int(self.capture.get(self.cv2.CAP_PROP_FRAME_COUNT))
        self.count = max(count, 0)  # of all frames; 0 if not known
        self.total = -(-self.count // every) or None

    def __iter__(self) -> Iterator[ReadFrame]:
        position = end = 0  # end: of what could be read
        now = first = 0.0
        while position - end < _FAILURES:
            taken = position % self.every == 0
            frame = self._read(taken)
            if frame is None and not self.is_camera and position >= self.count:
                break
            if frame is not None:
                before, now = now, self._time()
                if end == 0:
                    first = now
                elif now <= before:  # the file does not say
                    now = before + (position + 1 - end) / self.source_fps
                for broken in range(end, position):  # unreadable, but a later one is not
                    if broken % self.every == 0:
                        yield ReadFrame(f"{broken:06d}", None, f"frame {broken}: cannot be read")
                if taken:
                    yield ReadFrame(f"{position:06d}", frame, time=now - first)
                end = position + 1
            position += 1
        if self.is_camera:
            self.ending = f"{self.name}: gives no more frames"
        elif self.count - end > _SLACK:
            self.ending = f"{self.name}: ends after {end} frames, though it announces {self.count}"
        elif self.count:
            self.end = self.count / self.source_fps

    def _time(self) -> float:
        """When the frame read last is shown, in seconds; of a camera, when it was read."""
        if self.is_camera:
            return time.monotonic()
        return self.capture.get(self.cv2.CAP_PROP_POS_MSEC) / 1000

    def _file(self, path: str | int) -> Any:
        """Opens a file by FFmpeg, which is told in which formats; by another backend without it."""
        registry = self.cv2.videoio_registry
        if self.cv2.CAP_FFMPEG not in registry.getStreamBackends():
            return self.cv2.VideoCapture(path)
        before = os.environ.get(_OPTIONS)
        os.environ[_OPTIONS] = f"format_whitelist;{VIDEO_FORMATS}" + (
            f"|{before}" if before else ""
        )
        try:
            return self.cv2.VideoCapture(path, self.cv2.CAP_FFMPEG)
        finally:
            del os.environ[_OPTIONS]
            if before is not None:
                os.environ[_OPTIONS] = before

    def _read(self, wanted: bool) -> Pixels | None:
        """The next frame; None if it cannot be read. An unwanted frame is not decoded."""
        nothing = np.empty((0, 0, 3), np.uint8)
        if not self.capture.grab():
            return None
        if not wanted:
            return nothing
        done, pixels = self.capture.retrieve()
        return self.cv2.cvtColor(pixels, self.cv2.COLOR_BGR2RGB) if done else None

    def close(self) -> None:
        self.capture.release()


class VideoWriter:
    """An mp4 file, under a temporary name until it is closed.

    Args:
        path: path of the file.
        fps: frames per second, if `add` is not told when they are shown.

    Raises:
        ValueError: OpenCV is missing.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.cv2 = opencv("an overlaid video (--no-overlay works without it)")
        self.path, self.fps = path, fps
        # MPEG-4 counts time in parts of a second, at most 65,535, and OpenCV decimals by 10.
        decimals = next(d for d in (3, 2, 1, 0) if fps * 10**d <= 65_535 or d == 0)
        self._rate = round(fps, decimals) if fps >= 1 else fps
        self._times: list[float] = []
        self._temporary = path
        self._writer: Any = None
        self._open = ExitStack()

    def add(self, pixels: Pixels, time: float | None = None) -> None:
        """Adds the next frame (H, W, 3) RGB; all must have the same size. The codec needs even
        sides, so the last row or column of odd ones is repeated. Raises OSError if it cannot be
        written.

        Args:
            pixels: the frame.
            time: when it is shown, in seconds; later than the one before.
        """
        if time is None:
            time = self._times[-1] + 1 / self.fps if self._times else 0.0
        self._times.append(time)
        height, width = pixels.shape[:2]
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            code = self.cv2.VideoWriter_fourcc(*"mp4v")
            size = pixels.shape[1], pixels.shape[0]
            self._temporary = self._open.enter_context(private_file(self.path))
            writer = self.cv2.VideoWriter(str(self._temporary), code, self._rate, size)
            if not writer.isOpened():
                self._temporary.unlink(missing_ok=True)
                raise OSError(
                    f"{self.path}: OpenCV cannot write {size[0]}x{size[1]} at {self.fps:g} frames "
                    "per second (--no-overlay works without it)"
                )
            self._writer = writer
        self._writer.write(self.cv2.cvtColor(pixels, self.cv2.COLOR_RGB2BGR))

    def close(self, end: float | None = None) -> None:
        """Finishes the file; without frames there is no file.

        Args:
            end: until when the last frame is shown; None for as long as ``fps`` says.

        Raises:
            OSError: it could not be written, such as to a full disk; it is then removed.
        """
        with self._open:
            if self._writer is None:
                return
            self._writer.release()
            self._writer = None
            if not mp4.is_whole(self._temporary):
                raise OSError(f"{self.path}: could not be written whole; is the disk full?")
            self._set_times(end)

    def _set_times(self, end: float | None) -> None:
        """Leaves a constant rate as OpenCV wrote it, up to half a frame."""
        starts = [time - self._times[0] for time in self._times]
        usual = starts[-1] + 1 / self.fps
        end = usual if end is None or end - self._times[0] <= starts[-1] else end - self._times[0]
        constant = [i / self._rate for i in range(len(starts) + 1)]
        errors = (abs(a - b) for a, b in zip(constant, [*starts, end], strict=True))
        if max(errors) > 0.5 / self._rate:
            with naming(self.path):
                mp4.set_times(self._temporary, starts, end)


def opencv(purpose: str) -> Any:
    """OpenCV, without its messages and FFmpeg's. Raises ImportError where it is missing."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's number for quiet
    cv2 = extras.load(purpose, "cv2")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


def _natural(path: Path) -> list[tuple[int, str]]:
    """ "f10" after "f9": runs of digits compare as numbers."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
