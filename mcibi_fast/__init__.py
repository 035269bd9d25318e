"""MCIBI++ for semantic segmentation, with its own fused kernels.

``ops`` has the kernels as functions, ``nn`` modules, ``models`` whole networks, ``data`` datasets,
``metrics`` scores, ``training`` and ``inference`` the code that trains, tests and exports models,
and ``compat`` loads the authors' checkpoints. CONTRIBUTING.md has a map of everything.

``upsample_cross_entropy``, ``upsample_argmax`` and ``upsample_confusion`` are useful for any
segmentation network: they replace ``F.interpolate(logits, size)`` followed by the loss, the
prediction or the confusion matrix, and never form the upsampled logits.

``load`` opens a trained model that labels images: ``load("runs/scenes").predict("photo.jpg")``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mcibi_fast.version import __version__

if TYPE_CHECKING:
    from mcibi_fast import nn, ops
    from mcibi_fast._build import build_info
    from mcibi_fast.ops.dispatch import backend, explain
    from mcibi_fast.ops.upsample_argmax import upsample_argmax, upsample_confusion
    from mcibi_fast.ops.upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "__version__",
    "backend",
    "build_info",
    "explain",
    "load",
    "nn",
    "ops",
    "upsample_argmax",
    "upsample_confusion",
    "upsample_cross_entropy",
]

# Imported at first use: importing torch takes seconds, and `mcibi-fast --help` does not need it.
_HOMES = {
    "backend": "mcibi_fast.ops.dispatch",
    "build_info": "mcibi_fast._build",
    "explain": "mcibi_fast.ops.dispatch",
    "load": "mcibi_fast.inference.predictor",
    "upsample_argmax": "mcibi_fast.ops",
    "upsample_confusion": "mcibi_fast.ops",
    "upsample_cross_entropy": "mcibi_fast.ops",
}


_PACKAGES = ("compat", "data", "inference", "metrics", "models", "nn", "ops", "recipes", "training")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"mcibi_fast.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mcibi_fast' has no attribute {name!r}")
