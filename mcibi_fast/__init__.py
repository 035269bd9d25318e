"""MCIBI++ for semantic segmentation, with its own fused kernels.

``ops`` holds the kernels as functions, ``nn`` the modules, ``models`` whole networks, ``data``,
``engine`` and ``metrics`` what trains and evaluates them, ``compat`` other people's checkpoints.
"""

from mcibi_fast import nn, ops
from mcibi_fast._build import build_info
from mcibi_fast.ops.dispatch import backend, explain
from mcibi_fast.version import __version__

__all__ = ["__version__", "backend", "build_info", "explain", "nn", "ops"]
