"""Checks that the ops share. Each error names the argument and says what it should be."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from mcibi_fast.defaults import IGNORE_INDEX

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op computes: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensor(name: str, value: object, dims: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises unless ``value`` is a tensor with one dimension per word of ``dims``."""
    if type(value) is Tensor and value.dim() == dims.count(",") + 1 and value.dtype in dtypes:
        return
    if isinstance(value, torch.fx.Proxy):
        raise TypeError(
            f"{name}: torch.fx.symbolic_trace cannot trace the ops of mcibi_fast, which look at "
            "their arguments' shapes; use torch.export.export, or torch.fx.wrap for a function "
            "that calls the op"
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor ({dims}), got {type(value).__name__}")
    if value.dim() != len(dims.split(", ")):
        raise ValueError(f"{name}: expected shape ({dims}), got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: dtype {value.dtype} is not supported; use one of {names}")


def same_device(**tensors: Tensor) -> None:
    """Raises unless all the named tensors are on one device."""
    (first, reference), *rest = tensors.items()
    device = reference.device
    for name, value in rest:
        if value.device != device:
            raise ValueError(
                f"{name}: is on {value.device}, but {first} is on {device}; move them to one device"
            )


def number(name: str, value: object) -> float:
    """The value of a number: Python's, NumPy's or a one-element tensor; symbolic under tracing.

    Raises:
        TypeError: ``value`` is not a number.
    """
    if type(value) is float:
        return value
    if isinstance(value, (float, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if isinstance(value, (numbers.Real, torch.SymInt)) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def fraction(name: str, value: object) -> float:
    """The value of a number between 0 and 1.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: it is outside this interval, or NaN.
    """
    found = number(name, value)
    if not 0.0 <= found <= 1.0:
        raise ValueError(f"{name}: must be between 0 and 1, got {found}")
    return found


def finite(name: str, value: object) -> float:
    """The value of a finite number.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: it is not finite.
    """
    found = number(name, value)
    if not abs(found) < math.inf:
        raise ValueError(f"{name}: must be finite, got {found}")
    return found


def ignore_index(value: int, num_classes: int) -> None:
    """Raises if the default label of ignored pixels is that of a class."""
    if value == IGNORE_INDEX < num_classes:
        raise ValueError(
            f"ignore_index: {IGNORE_INDEX}, the default, is the label of one of the {num_classes} "
            "classes; pass a label that belongs to no class, such as -1"
        )


def positive(name: str, value: int) -> None:
    """Raises unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: must be at least 1, got {value}")


def memory(value: Tensor) -> None:
    """Raises unless ``value`` is a (K, 2) memory in float32 or float64."""
    tensor("memory", value, "K, 2", (torch.float32, torch.float64))
    if value.shape[1] != 2:
        raise ValueError(
            f"memory: expected shape (K, 2), mean and standard deviation, got {tuple(value.shape)}"
        )


def not_empty(name: str, value: Tensor) -> None:
    """Raises if a dimension of ``value`` is empty."""
    if 0 in value.shape:
        raise ValueError(f"{name}: no dimension may be empty, got {tuple(value.shape)}")


def features_and_labels(features: Tensor, labels: Tensor) -> None:
    """Raises unless features are (B, Z, h, w) floats and labels (B, H, W) integers."""
    tensor("features", features, "B, Z, h, w", FLOATS)
    _labels(labels, "features", features)
    not_empty("features", features)


def logits(value: Tensor) -> None:
    """Raises unless ``value`` are (B, K, h, w) floats."""
    tensor("logits", value, "B, K, h, w", FLOATS)
    not_empty("logits", value)


def logits_and_labels(value: Tensor, labels: Tensor) -> None:
    """Raises unless logits are (B, K, h, w) floats and labels (B, H, W) integers."""
    logits(value)
    _labels(labels, "logits", value)


def _labels(labels: Tensor, name: str, maps: Tensor) -> None:
    """Raises unless labels are (B, H, W) integers for maps of that name."""
    tensor("labels", labels, "B, H, W", INTEGERS)
    same_device(**{name: maps, "labels": labels})
    if maps.shape[0] != labels.shape[0]:
        raise ValueError(
            f"labels: batch of {labels.shape[0]}, but {name} have a batch of {maps.shape[0]}"
        )
    not_empty("labels", labels)


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inside autocast, the tensors in its dtype, as its own matrix products do (float64 stays)."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
