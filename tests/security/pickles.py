"""Files that run code, or fill the memory, in the hands of whoever reads them carelessly."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GIB = 2**30


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def spread(*shape: int) -> Tensor:
    """One value, spread over a shape without memory; torch.save keeps it as that."""
    return torch.zeros(1).expand(*shape)


def nested(levels: int) -> Any:
    """A list of 2 ** levels entries to whoever follows each of them."""
    item: Any = []
    for _ in range(levels):
        item = [item, item]
    return item


def endless() -> list[Any]:
    item: list[Any] = []
    item.append(item)
    return item


def attacks(marker: Path) -> dict[str, tuple[Callable[[], Any], str]]:
    """By name: what stands in the place of an entry, and what the error says.

    Args:
        marker: a file that code in the file would make.
    """
    touch = f"touch {marker}"
    return {
        "code": (lambda: Call(os.system, touch), "posix system"),
        "evaluated code": (lambda: Call(eval, f"open({str(marker)!r}, 'w')"), "__builtin__ eval"),
        "bytes without end": (lambda: Call(bytearray, 64 * GIB), "__builtin__ bytearray"),
        "a tensor by its size": (lambda: Call(torch.Tensor, 16 * GIB), "torch Tensor"),
        "one value spread": (lambda: spread(10 * GIB), "with 1 values"),
        "tensors that share": (lambda: [torch.zeros(10**6)] * 100, "MAX_SHARING"),
        "a tree without end": (lambda: nested(60), "MAX_ENTRIES"),
        "a list in itself": (endless, "MAX_ENTRIES"),
        "sparse": (lambda: torch.zeros(2).to_sparse(), "_rebuild_sparse_tensor"),
        "without values": (lambda: torch.zeros(10 * GIB, device="meta"), "meta_tensor"),
    }
