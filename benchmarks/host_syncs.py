"""Counts the calls that make the host wait for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or whose result's size, is needed on the host.
_WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::equal",
}


class HostSyncs(TorchDispatchMode):
    """Counts PyTorch operators that wait if they run on a CUDA tensor; on the CPU the same calls.

    These are reading a number, operators whose result's size depends on the data, indexing with a
    boolean mask, and copies from a device to the host. What one of this package's operators does
    inside is not counted; ``count`` on a GPU uses the driver's warnings, which include that.

    Attributes:
        calls: how often each operator waited.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.calls.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name()
        base = name.partition(".")[0]
        if base in _WAITING or _masks(base, args) or _to_host(base, args, result):
            self.calls[name] += 1
        return result


def _masks(base: str, args: tuple[Any, ...]) -> bool:
    if base not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return False
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _to_host(base: str, args: tuple[Any, ...], result: Any) -> bool:
    if base not in ("aten::_to_copy", "aten::copy_"):
        return False
    source = args[0] if base == "aten::_to_copy" else args[1]
    return source.device.type != "cpu" and isinstance(result, Tensor) and result.is_cpu


def count(run: Callable[[], Any], device: str) -> int:
    """How often a function makes the host wait.

    On a GPU the CUDA runtime's own warnings are counted, on the CPU the calls that would wait.
    """
    if device != "cuda":
        with HostSyncs() as syncs:
            run()
        return syncs.total
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)
