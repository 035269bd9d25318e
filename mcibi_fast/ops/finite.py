"""Rows of a memory that an update would make infinite or NaN: they are kept, and counted."""

from __future__ import annotations

import torch
from torch import Tensor

from mcibi_fast.ops import device_counts
from mcibi_fast.ops.dispatch import Kernel, Op, always
from mcibi_fast.ops.recompute import recomputing

_counters: dict[torch.device, Tensor] = {}


def counter(device: torch.device) -> Tensor:
    """The device's counter of rows that were kept, int64 (1,).

    For the recomputation of a checkpointed call, whose rows were counted before, it is another one
    that nobody reads.
    """
    if recomputing():
        return torch.zeros(1, dtype=torch.int64, device=device)
    return device_counts.kept(_counters, device, 1, "memory")


def kept_rows() -> int:
    """How many rows memories have kept since the last call because of values that are not finite.

    One overflow, as float16 has now and then, must not stay in a memory for good. A class whose
    statistics of one batch are infinite or NaN therefore keeps its row in that step, and nothing
    waits for the device to find out. This function waits for it: call it where the device is waited
    for anyway, for example where the loss is read. Each process counts for itself; processes that
    pool their batches keep, and count, the same rows.
    """
    count = 0
    for tensor in _counters.values():
        count += int(tensor)
        tensor.zero_()
    return count


def finite_rows(rows: Tensor, seen: Tensor) -> Tensor:
    """Which classes may take their new row: those with pixels whose values are all finite.

    The others among the classes with pixels are counted, see :func:`kept_rows`.

    Args:
        rows: the new rows (K, ...).
        seen: which classes have pixels, bool (K,).

    Returns:
        bool (K,).
    """
    return FINITE_ROWS(rows, seen)


def _finite(rows: Tensor, seen: Tensor) -> Tensor:
    return seen & rows.isfinite().flatten(1).all(1)


def _count(rows: Tensor, seen: Tensor) -> Tensor:
    finite = _finite(rows, seen)
    counter(rows.device).add_((seen & ~finite).sum())
    return finite


FINITE_ROWS = Op(
    "finite_rows",
    [Kernel("reference", _count, always)],
    lambda rows, seen: torch.empty_like(seen, memory_format=torch.contiguous_format),
)
FINITE_ROWS.without_gradient(_finite)
