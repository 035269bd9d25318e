"""Labels outside [0, K): an error at once on the CPU, a flag to be read later on CUDA."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from mcibi_fast._schemas import OPS_WITH_LABELS
from mcibi_fast.ops import device_counts

_flags: dict[torch.device, Tensor] = {}


def flag(device: torch.device) -> Tensor:
    """The device's flag: int64 (number of bad labels, first bad value, number of the op)."""
    return device_counts.kept(_flags, device, 3, "labels")


def check_labels() -> None:
    """Raises if any op on any GPU met a bad label since the last call. Waits for the GPUs.

    CUDA kernels never stop at a bad label: it contributes to nothing and is counted. Call this
    wherever the device is waited for anyway, for example where the loss is read. With
    ``MCIBI_FAST_CHECKS=sync`` in the environment every op calls it by itself (slow).

    Raises:
        ValueError: naming the op, how many labels were bad, and the first of them.
    """
    for device, tensor in _flags.items():
        count, value, op = tensor.tolist()
        if count:
            tensor.zero_()
            name = OPS_WITH_LABELS["cuda"][op]
            raise ValueError(
                f"labels: {name} on {device} met {count} labels outside "
                f"[0, num_classes) that are not ignore_index; the first is {value}"
            )


def check_now() -> None:
    """What an op does after a launch: nothing, unless MCIBI_FAST_CHECKS=sync asks for it."""
    if os.environ.get("MCIBI_FAST_CHECKS") == "sync":
        check_labels()


def bad_label(
    num_classes: int, ignore_index: int, value: int, b: int, y: int, x: int
) -> ValueError:
    """The error about ``labels[b, y, x]``. CPU kernels report the six numbers in this order."""
    return ValueError(
        f"labels: value {value} at (b={b}, y={y}, x={x}) is outside [0, {num_classes}) and is not "
        f"ignore_index ({ignore_index})"
    )


def without_bad_labels(labels: Tensor, num_classes: int, ignore_index: int, op: str) -> Tensor:
    """The labels as int64 with -1 for ignored ones, for the reference.

    Raises:
        ValueError: on the CPU, a label is neither in [0, num_classes) nor ``ignore_index``. On
            CUDA it is flagged instead, and ignored.
    """
    labels = labels.long()
    if not (labels.is_meta or is_fake(labels)):  # the labels of a compiler's graph have no values
        with disable_proxy_modes_tracing():  # torch.func.linearize must not trace the check
            _report(_untransformed(labels), num_classes, ignore_index, op)
    valid = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    return labels.masked_fill(~valid, -1)


def _untransformed(labels: Tensor) -> Tensor:
    """The values below the transforms of ``torch.func``: vmap's batch is the first dimension."""
    while torch._C._functorch.is_functorch_wrapped_tensor(labels):
        labels = torch._C._functorch.get_unwrapped(labels)
    return labels


def _report(labels: Tensor, num_classes: int, ignore_index: int, op: str) -> None:
    """Raises for a wrong label on the CPU, flags it on CUDA."""
    bad = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if labels.is_cuda:
        found, first = flag(labels.device), labels[bad.nonzero(as_tuple=True)]
        if first.numel():
            found += torch.tensor([first.numel(), 0, 0], device=labels.device)
            found[1], found[2] = first[0], OPS_WITH_LABELS["cuda"].index(op)
    elif bad.any():
        where = bad.nonzero()[0].tolist()
        raise bad_label(num_classes, ignore_index, int(labels[tuple(where)]), *where[-3:])
