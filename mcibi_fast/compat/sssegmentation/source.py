"""The files of checkpoints of the authors' released code: ``{"model": state_dict}``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mcibi_fast.compat.shapes import StateDict
from mcibi_fast.untrusted import check_tensors, read_torch

Checkpoint = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A checkpoint's entries, names that may be its own, how to call it, and what to say of it."""

    state: StateDict
    names: tuple[str, ...]
    title: str
    notes: list[str]


def read(checkpoint: Checkpoint, ema: bool | None) -> Source:
    """Reads and checks a checkpoint; see :func:`mcibi_fast.compat.sssegmentation.load`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of the released code, or lacks the weights of ``ema``.
    """
    known_as: tuple[str, ...] = ()
    title = "checkpoint"
    if not isinstance(checkpoint, Mapping):
        path = followed(Path(checkpoint))
        known_as, title = (Path(checkpoint).stem, path.stem, path.absolute().parent.name), str(path)
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint: there is no file {path}")
        try:
            checkpoint = read_torch(path)
        except ValueError as error:
            raise ValueError(f"checkpoint: torch cannot load {path} ({error})") from error
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("model"), Mapping):
        raise ValueError('checkpoint: expected {"model": state_dict}, as the released code saves')
    averaged = isinstance(checkpoint.get("model_ema"), Mapping)
    if ema and not averaged:
        raise ValueError("checkpoint: it has no averaged weights (model_ema); load it without ema")
    notes = []
    if averaged and ema is None:
        notes.append(
            "it also has averaged weights (model_ema), which are not loaded; ema=True (convert: "
            "--ema) loads them instead"
        )
    state = checkpoint["model_ema" if ema else "model"]
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"checkpoint: its entry {name!r} is no tensor with a name")
    try:
        check_tensors(state)
    except ValueError as error:
        raise ValueError(f"checkpoint: {error}") from error
    return Source(state, known_as, title, notes)


def followed(path: Path) -> Path:
    """The file that a path means.

    The trainer links ``FOLDER/checkpoints-epoch-latest.pth`` to ``FOLDER/checkpoints-epoch-9.pth``
    as seen from where it was started, which leads nowhere from within the folder. The file that is
    meant lies beside the link.
    """
    if path.is_symlink() and not path.exists():
        beside = path.parent / Path(os.readlink(path)).name
        if beside.is_file():
            return beside
    return path
