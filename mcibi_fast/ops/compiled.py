"""The kernels compiled from ``csrc/<op>/``, as backends "cpu" and "cuda" of their ops.

Each library has operators of its own, ``torch.ops.mcibi_fast_cpu.<op>`` and
``torch.ops.mcibi_fast_cuda.<op>``. They take the op's arguments and, where they report wrong
labels, a tensor for the report (see ``labels``); where they keep rows of a memory, a tensor that
counts these (see ``finite``).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mcibi_fast import _build
from mcibi_fast._schemas import OPS_THAT_KEEP_ROWS, OPS_WITH_LABELS
from mcibi_fast.ops import finite, labels
from mcibi_fast.ops.dispatch import Kernel

_thread = threading.local()


def _report() -> Tensor:
    """This thread's tensor of zeros, for the numbers of a wrong label."""
    if not hasattr(_thread, "report"):
        with torch.inference_mode(False):
            _thread.report = torch.zeros(6, dtype=torch.int64, device="cpu")
    return _thread.report


def cpu_kernel(name: str) -> Kernel:
    """The kernel of the op ``name`` in ``_cpu``. A wrong label is a ValueError at once."""

    @functools.cache
    def operator() -> Any:
        return getattr(torch.ops.mcibi_fast_cpu, name).default

    def run(*args: Any) -> Any:
        return operator()(*args)

    def run_and_check(*args: Any) -> Any:
        report = _report()
        result = run(*args, report, *_counters(name, args))
        if any(numbers := report.tolist()):
            report.zero_()
            raise labels.bad_label(*numbers)
        return result

    has_labels = name in OPS_WITH_LABELS["cpu"]
    return Kernel("cpu", run_and_check if has_labels else run, _why_not("cpu"))


def cuda_kernel(name: str) -> Kernel:
    """The kernel of the op ``name`` in ``_cuda``. Wrong labels are counted for ``check_labels``."""

    def run(*args: Any) -> Any:
        return getattr(torch.ops.mcibi_fast_cuda, name)(*args)

    def run_and_count(*args: Any) -> Any:
        result = run(*args, labels.flag(args[0].device), *_counters(name, args))
        labels.check_now()
        return result

    has_labels = name in OPS_WITH_LABELS["cuda"]
    return Kernel("cuda", run_and_count if has_labels else run, _why_not("cuda"))


def _counters(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    return [finite.counter(args[0].device)] if name in OPS_THAT_KEEP_ROWS else []


def _why_not(backend: str) -> Callable[..., str | None]:
    """The library must be there, the tensors on the device of the same name, and a GPU one that the
    library has code for.
    """

    def why_not(*args: Any) -> str | None:
        reason = _build.load_extensions()[backend]
        if reason is not None:
            return reason
        for arg in args:
            if isinstance(arg, Tensor) and arg.device.type != backend:
                return f"a tensor is on {arg.device.type}, not on {backend}"
        return _build.why_not_on(args[0].device.index) if backend == "cuda" else None

    return why_not
