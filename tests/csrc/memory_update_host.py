"""The memory update's CUDA launchers on the host executor, with tensors for arguments."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from mcibi_fast._schemas import OPS_WITH_LABELS
from tests.csrc.host_kernels import HostKernels

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # FloatKind
LABEL_OPS = OPS_WITH_LABELS["cuda"]  # a flag's third number is the place of an op here
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]  # LabelKind


class FeatureMap(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("kind", c_int)] + [
        (name, c_int64)
        for name in ("batch", "channels", "height", "width", "b", "z", "y", "x")  # sizes, strides
    ]


class LabelMap(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("kind", c_int)] + [
        (name, c_int64)
        for name in ("height", "width", "b", "y", "x", "num_classes", "ignore_index")
    ]


class LabelFlag(ctypes.Structure):
    _fields_ = [("flag", c_void_p), ("op", c_int64)]


class MemoryUpdate(ctypes.Structure):
    _fields_ = [
        ("memory", c_void_p),
        ("next", c_void_p),
        ("kind", c_int),
        ("stride_k", c_int64),
        ("stride_column", c_int64),
        ("momentum", c_double),
        ("unbiased", c_bool),
        ("kept_rows", c_void_p),
    ]


class MemoryUpdateHost:
    """The ops with the signatures of torch.ops.mcibi_fast_cuda; results start as NaN."""

    def __init__(self, kernels: HostKernels) -> None:
        self.kernels = kernels
        for name in ("class_feature_sums", "memory_update", "class_feature_sums_backward"):
            getattr(kernels.cdll, f"host_{name}").restype = ctypes.c_char_p

    def class_feature_sums(
        self,
        features: Tensor,
        labels: Tensor,
        num_classes: int,
        ignore_index: int = 255,
        align_corners: bool = False,
        flag: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        sums = torch.full((num_classes, features.shape[1]), torch.nan, dtype=dtype)
        counts = torch.full((num_classes,), -(2**60))
        self._call(
            "class_feature_sums",
            _features(features),
            _labels(labels, num_classes, ignore_index),
            c_bool(align_corners),
            c_void_p(sums.data_ptr()),
            c_void_p(counts.data_ptr()),
            ctypes.byref(label_flag(flag, "class_feature_sums")),
        )
        return sums, counts

    def memory_update(
        self,
        memory: Tensor,
        features: Tensor,
        labels: Tensor,
        momentum: float = 0.1,
        unbiased: bool = False,
        ignore_index: int = 255,
        align_corners: bool = False,
        flag: Tensor | None = None,
        kept_rows: Tensor | None = None,
    ) -> Tensor:
        result = torch.full(memory.shape, torch.nan, dtype=memory.dtype)
        update = MemoryUpdate(
            memory.data_ptr(),
            result.data_ptr(),
            FLOATS.index(memory.dtype),
            *memory.stride(),
            momentum,
            unbiased,
            None if kept_rows is None else kept_rows.data_ptr(),
        )
        self._call(
            "memory_update",
            _features(features),
            _labels(labels, len(memory), ignore_index),
            c_bool(align_corners),
            ctypes.byref(update),
            ctypes.byref(label_flag(flag, "memory_update")),
        )
        return result

    def scratch_bytes(self, size: tuple[int, ...], labels: tuple[int, ...], classes: int) -> int:
        """What an update allocates beside its result, for bfloat16 features of this size."""
        run = self.kernels.cdll.host_memory_update_scratch
        run.restype = ctypes.c_size_t
        features = torch.zeros(1, dtype=torch.bfloat16).expand(size)
        label_map = torch.zeros(1, dtype=torch.uint8).expand(labels)
        return run(_features(features), _labels(label_map, classes, 255))

    def class_feature_sums_backward(
        self,
        grad_sums: Tensor,
        labels: Tensor,
        height: int,
        width: int,
        ignore_index: int = 255,
        align_corners: bool = False,
        dtype: torch.dtype = torch.float32,
        flag: Tensor | None = None,
    ) -> Tensor:
        classes, channels = grad_sums.shape
        result = torch.full((len(labels), channels, height, width), torch.nan, dtype=dtype)
        self._call(
            "class_feature_sums_backward",
            c_void_p(grad_sums.contiguous().data_ptr()),
            _labels(labels, classes, ignore_index),
            c_bool(align_corners),
            _features(result),
            ctypes.byref(label_flag(flag, "class_feature_sums_backward")),
        )
        return result

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self.kernels.cdll, f"host_{name}")(*arguments)
        if error is not None:
            raise RuntimeError(error.decode())


def _features(t: Tensor) -> object:
    return ctypes.byref(FeatureMap(t.data_ptr(), FLOATS.index(t.dtype), *t.shape, *t.stride()))


def _labels(t: Tensor, num_classes: int, ignore_index: int) -> object:
    _, height, width = t.shape
    strides = t.stride()
    kind = INTEGERS.index(t.dtype)
    return ctypes.byref(
        LabelMap(t.data_ptr(), kind, height, width, *strides, num_classes, ignore_index)
    )


def label_flag(flag: Tensor | None, op: str) -> LabelFlag:
    return LabelFlag(None if flag is None else flag.data_ptr(), LABEL_OPS.index(op))
