"""The cross entropy's CUDA launchers on the host executor, with tensors for arguments."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from tests.csrc.host_kernels import HostKernels
from tests.csrc.memory_update_host import FLOATS, INTEGERS, LabelMap, label_flag

OP = "upsample_cross_entropy"


class LogitMap(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("kind", c_int)] + [
        (name, c_int64)
        for name in ("batch", "classes", "height", "width", "b", "k", "y", "x")  # sizes, strides
    ]


class CrossEntropyOptions(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("label_smoothing", c_double), ("align_corners", c_bool)]


class CrossEntropyCotangent(ctypes.Structure):
    _fields_ = [("grad_losses", c_void_p), ("b", c_int64), ("y", c_int64), ("x", c_int64)] + [
        ("statistic", c_void_p)
    ]


def logit_map(t: Tensor) -> LogitMap:
    return LogitMap(t.data_ptr(), FLOATS.index(t.dtype), *t.shape, *t.stride())


def label_map(t: Tensor, num_classes: int, ignore_index: int) -> LabelMap:
    _, height, width = t.shape
    kind = INTEGERS.index(t.dtype)
    return LabelMap(t.data_ptr(), kind, height, width, *t.stride(), num_classes, ignore_index)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class UpsampleCrossEntropyHost:
    """The ops with the signatures of torch.ops.mcibi_fast_cuda; results start as NaN.

    The statistic of the forward is a bound of the logits of each pixel and the sum of exponentials
    relative to it.
    """

    def __init__(self, kernels: HostKernels) -> None:
        self.kernels = kernels
        for name in ("", "_backward", "_reduced", "_gather"):
            getattr(kernels.cdll, f"host_{OP}{name}").restype = ctypes.c_char_p
        for name in ("_backward_scratch", "_reduced_sums"):
            getattr(kernels.cdll, f"host_{OP}{name}").restype = c_int64

    def upsample_cross_entropy(
        self,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        label_smoothing: float = 0.0,
        align_corners: bool = False,
        flag: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        losses = torch.full(labels.shape, torch.nan, dtype=wide(logits.dtype))
        statistic = torch.full((2, *labels.shape), torch.nan, dtype=losses.dtype)
        self._call(
            "upsample_cross_entropy",
            logit_map(logits),
            label_map(labels, logits.shape[1], ignore_index),
            _options(weight, label_smoothing, align_corners),
            c_void_p(losses.data_ptr()),
            c_void_p(statistic.data_ptr()),
            label_flag(flag, "upsample_cross_entropy"),
        )
        return losses, statistic

    def upsample_cross_entropy_backward(
        self,
        grad_losses: Tensor,
        logits: Tensor,
        labels: Tensor,
        statistic: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        label_smoothing: float = 0.0,
        align_corners: bool = False,
        flag: Tensor | None = None,
    ) -> Tensor:
        grad = _nan_like(logits)
        assert statistic.shape == (2, *labels.shape) and statistic.is_contiguous()
        self._call(
            "upsample_cross_entropy_backward",
            CrossEntropyCotangent(
                grad_losses.data_ptr(), *grad_losses.stride(), statistic.data_ptr()
            ),
            logit_map(logits),
            label_map(labels, logits.shape[1], ignore_index),
            _options(weight, label_smoothing, align_corners),
            logit_map(grad),
            label_flag(flag, "upsample_cross_entropy"),
        )
        return grad

    def upsample_cross_entropy_reduced(
        self,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        label_smoothing: float = 0.0,
        align_corners: bool = False,
        mean: bool = True,
        flag: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        loss = torch.full((), torch.nan)
        sums = torch.full((self.bytes_of("reduced_sums", logits, labels) // 4,), torch.nan)
        self._call(
            "upsample_cross_entropy_reduced",
            logit_map(logits),
            label_map(labels, logits.shape[1], ignore_index),
            _options(weight, label_smoothing, align_corners),
            c_int(mean),
            c_void_p(loss.data_ptr()),
            c_void_p(sums.data_ptr()),
            label_flag(flag, "upsample_cross_entropy"),
        )
        return loss, sums

    def upsample_cross_entropy_gather(
        self, grad_loss: Tensor, sums: Tensor, logits: Tensor, labels: Tensor
    ) -> Tensor:
        grad = _nan_like(logits)
        self._call(
            "upsample_cross_entropy_gather",
            c_void_p(grad_loss.data_ptr()),
            c_void_p(sums.data_ptr()),
            label_map(labels, logits.shape[1], 255),
            logit_map(grad),
        )
        return grad

    def bytes_of(self, what: str, logits: Tensor, labels: Tensor) -> int:
        """Of the memory "backward_scratch" or "reduced_sums"."""
        bytes_: int = getattr(self.kernels.cdll, f"host_{OP}_{what}")(
            ctypes.byref(logit_map(logits)),
            ctypes.byref(label_map(labels, logits.shape[1], 255)),
        )
        return bytes_

    def _call(self, name: str, *arguments: object) -> None:
        references = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
        error = getattr(self.kernels.cdll, f"host_{name}")(*references)
        if error is not None:
            raise RuntimeError(error.decode())


def _nan_like(logits: Tensor) -> Tensor:
    """In the layout that the bindings give to a gradient."""
    channels_last = logits.is_contiguous(memory_format=torch.channels_last)
    layout = torch.contiguous_format
    if channels_last and not logits.is_contiguous():
        layout = torch.channels_last
    return torch.full(logits.shape, torch.nan, dtype=logits.dtype).to(memory_format=layout)


def _options(
    weight: Tensor | None, label_smoothing: float, align_corners: bool
) -> CrossEntropyOptions:
    pointer = None if weight is None else weight.data_ptr()
    return CrossEntropyOptions(pointer, label_smoothing, align_corners)
