"""The pictures that predictions are written to.

Each carries a mark, by which it is never taken for an input, and by which the program knows what it
may replace: files without the mark belong to the user.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from PIL import Image

from mcibi_fast.files import make_folder, new_file
from mcibi_fast.untrusted import open_regular

_LONGEST_NAME = 255  # bytes of a file's name, on all usual file systems


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")


_END = _chunk(b"IEND", b"")
_MARKED_ENDS = {
    writer: _chunk(b"tEXt", f"Software\0mcibi-fast {writer}".encode()) + _END
    for writer in ("predict", "video")
}


def save_picture(
    image: Image.Image, path: Path, *, below: Path, writer: Literal["predict", "video"] = "predict"
) -> None:
    """Writes a PNG with the mark, whole or not at all; links in its way are replaced, see
    `make_folder`.
    """
    make_folder(path.parent, below=below)
    with new_file(path, sync=False) as file:
        image.save(file, "PNG")
        file.seek(-len(_END), os.SEEK_END)
        file.write(_MARKED_ENDS[writer])


def writer_of(path: Path) -> str | None:
    """Which command wrote the file by `save_picture`: "predict", "video", or None of them."""
    if path.suffix.lower() != ".png":
        return None
    try:
        with open_regular(path) as file:
            file.seek(-max(map(len, _MARKED_ENDS.values())), os.SEEK_END)
            content = file.read()
    except OSError:  # gone, not a file, or shorter
        return None
    return next((w for w, end in _MARKED_ENDS.items() if content.endswith(end)), None)


def short_name(name: str) -> str:
    """The name of a file, at most 255 bytes long: the end of a longer one becomes a checksum."""
    if len(os.fsencode(name)) <= _LONGEST_NAME:
        return name
    stem, suffix = os.path.splitext(name)
    end = f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{suffix[-16:]}"
    while len(os.fsencode(stem + end)) > _LONGEST_NAME:
        stem = stem[:-1]
    return stem + end


def check_targets(
    targets: Iterable[Path], inputs: Iterable[Path], *, overwrite: bool = False
) -> None:
    """Checks that no output is in the place of an input or of a user's file.

    Args:
        targets: where outputs will be written.
        inputs: the files that are read.
        overwrite: files without the mark may be replaced, but never an input.

    Raises:
        ValueError: naming the first file that would be lost.
    """
    existing = [target for target in targets if os.path.lexists(target)]
    if not existing:
        return
    sources = {path.resolve() for path in inputs}
    for target in existing:
        if target.resolve() in sources:
            raise ValueError(f"out: {target} is one of the inputs; choose another folder")
        if not overwrite and writer_of(target) is None:
            raise ValueError(
                f"out: {target} is already there, and is no prediction; choose another folder "
                "(--overwrite replaces such files)"
            )


def check_used_folder(out: Path, source: Path) -> None:
    """Checks that the folder ``out`` of a video holds nothing but what an earlier `video` wrote.

    Raises:
        ValueError: it holds other label maps or another overlay.mp4, or the source itself.
    """
    labels, overlay = out / "labels", out / "overlay.mp4"
    for path in (labels, overlay):
        if path.exists() and source.exists() and path.samefile(source):
            raise ValueError(f"out: {path} is the source; choose another folder")
    there = list(labels.iterdir()) if labels.is_dir() else []
    other = [path for path in there if writer_of(path) != "video"]
    if overlay.exists() and not there:
        other.append(overlay)
    if other:
        raise ValueError(
            f"out: {other[0]} is already there, and is of no earlier video; choose another folder"
        )


def clear_used_folder(out: Path) -> None:
    """Removes what an earlier `video` wrote, see `check_used_folder`."""
    labels = out / "labels"
    if labels.is_dir() and not labels.is_symlink():
        for path in labels.iterdir():
            if writer_of(path) == "video":
                path.unlink()
        (out / "overlay.mp4").unlink(missing_ok=True)
