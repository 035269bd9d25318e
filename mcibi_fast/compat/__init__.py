"""Loads models of other code and accelerates them: one package per library.

``compat.<library>.accelerate(model)`` for ``transformers``, ``smp``, ``torchvision``, ``mmseg`` and
``sssegmentation``; ``restore(model)`` undoes it, ``explain(model)`` says what it does. A library is
imported when its name is first used, so that none of them needs to be installed for the others.
"""

from __future__ import annotations

import importlib
from typing import Any

_LIBRARIES = ("mmseg", "smp", "sssegmentation", "torchvision", "transformers")


def __getattr__(name: str) -> Any:
    if name in _LIBRARIES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LIBRARIES})
