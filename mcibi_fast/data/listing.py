"""Lists the image files in a folder, by one rule for datasets, checks, prediction and videos.

Files count by the endings of their names, in upper or lower case, in all subfolders. Hidden files
and folders (``.ipynb_checkpoints``, ``._photo.jpg``) and those that systems create (``Thumbs.db``,
``__MACOSX``) do not count. What is left out is counted, too. Links to folders are followed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mcibi_fast.data.images import IMAGE_SUFFIXES

_OF_SYSTEMS = {
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin"),
    *("system volume information", "lost+found", "__pycache__", "icon\r"),
}
_HIDDEN = "hidden or of the system"


@dataclass
class Images:
    """Paths of images, with "/", relative to the folder and sorted; and what is left out.

    ``left_out`` has the paths left out for each reason.
    """

    paths: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: str) -> None:
        """Notes that ``path`` is left out."""
        self.left_out.setdefault(reason, []).append(path)

    def describe(self, *, hidden: bool = True) -> str:
        """What is left out, in words; "" if nothing is. Without ``hidden`` only what is seen."""
        return ", ".join(
            f"{len(paths):,} {reason} (such as {min(paths)})"
            for reason, paths in sorted(self.left_out.items())
            if hidden or reason != _HIDDEN
        )


def list_images(folder: str | Path, *, nested: bool = True) -> Images:
    """The images in a folder, and unless ``nested`` is False in its subfolders."""
    found = Images()
    # A folder's path, how the paths in it begin, and the folders above it by device and inode.
    pending: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(str(folder), "", ())]
    while pending:
        place, prefix, above = pending.pop()
        status = os.stat(place)
        here = status.st_dev, status.st_ino
        if here in above:
            found.leave_out("links to a folder above", prefix)
            continue
        with os.scandir(place) as entries:
            for entry in entries:
                path = prefix + entry.name
                suffix = os.path.splitext(entry.name)[1].lower()
                if is_hidden(entry.name):
                    found.leave_out(_HIDDEN, path)
                elif suffix in IMAGE_SUFFIXES:  # reading it says so if it is no file
                    found.paths.append(path)
                elif not entry.is_dir():
                    found.leave_out(suffix or "without an ending", path)
                elif nested:
                    pending.append((entry.path, f"{path}/", (*above, here)))
                else:
                    found.leave_out("folders", path)
    found.paths.sort()
    return found


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or created by a system."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The paths without their endings; those that would then be equal keep them.

    "a.jpg" becomes "a", but beside "a.png" it stays "a.jpg". No two results are equal, if no two
    paths are.
    """
    names = [os.path.splitext(path)[0] for path in paths]
    while True:
        places: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            places.setdefault(name, []).append(i)
        clashes = [i for same in places.values() if len(same) > 1 for i in same]
        if not clashes:
            return names
        for i in clashes:
            names[i] = paths[i]
