"""Checks where a command will write before its work begins."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_RUN_FILES = ("config.json", "data.json", "history.jsonl", "lock", "checkpoints", "tensorboard")


def check_file(
    option: str,
    path: str | Path,
    *,
    inputs: Iterable[str | Path] = (),
    make_folder: bool = False,
) -> Path:
    """Checks that a file can be written.

    Args:
        option: begins the error, such as "--json".
        path: of the file.
        inputs: files that the command reads.
        make_folder: its folder may be missing, and will be made.

    Raises:
        ValueError: the path is a folder, an input, or a file by which a run is continued.
        OSError: its folder is missing or nothing can be written there.
    """
    path = Path(path)
    if make_folder:
        check_folder(option, path.parent)
    elif not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}; make it first")
    else:
        _check_access(option, path, path.parent)
    if path.is_dir():
        raise ValueError(f"{option} {path}: is a folder; name a file")
    if path.resolve() in {Path(source).resolve() for source in inputs}:
        raise ValueError(f"{option} {path}: is one of the inputs; name another file")
    if _is_of_a_run(path):
        raise ValueError(f"{option} {path}: is a run's own file; name another file")
    return path


def check_folder(option: str, path: str | Path) -> Path:
    """Checks that files can be written into a folder, which need not exist yet.

    Raises:
        ValueError: the path, or what should be a folder above it, is a file.
        OSError: nothing can be written there.
    """
    path = Path(path)
    above = path
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{option} {path}: {above} is not a folder; choose another")
    _check_access(option, path, above)
    return path


def _is_of_a_run(path: Path) -> bool:
    """Whether the file is, or would be, among those that a training keeps in its directory."""
    path = path.resolve()
    return any(
        path.relative_to(folder).parts[0] in _RUN_FILES
        for folder in path.parents
        if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()
    )


def _check_access(option: str, path: Path, folder: Path) -> None:
    with suppress(FileNotFoundError):
        os.stat(path)  # other errors, such as a name that is too long, name the path
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {path}: nothing may be written in {folder}")
