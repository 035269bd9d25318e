"""For the workers: a library under test in the place of the installed one."""

from __future__ import annotations

import unittest.mock
from pathlib import Path

import torch

from mcibi_fast import _build


def load_in_place(library: str, name: str) -> None:
    """Loads a library in the place of the package's ``_cpu.so`` or ``_cuda.so``.

    Both would register the same operators, so the installed one, if there is one, must not be
    loaded later by an op that asks which kernels there are.
    """
    original, loaded = torch.ops.load_library, []

    def replacing(path: Path) -> None:
        if path.name == name:
            loaded.append(path)
        original(library if path.name == name else path)

    with unittest.mock.patch.object(torch.ops, "load_library", replacing):
        _build.load_extensions()  # once per process
    if not loaded:  # the package was built without that part
        torch.ops.load_library(library)
