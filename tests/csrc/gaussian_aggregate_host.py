"""The aggregation's CUDA launchers on the host executor, with tensors for arguments."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from tests.csrc.host_kernels import HostKernels

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # FloatKind


class MapStrides(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("batch", "channel", "row", "column")]


class GaussianTableInput(ctypes.Structure):
    _fields_ = [
        ("memory", c_void_p),
        ("memory_kind", c_int),
        ("memory_class_stride", c_int64),
        ("memory_column_stride", c_int64),
        ("classes", c_int64),
        ("channels", c_int64),
        ("kind", c_int),
        ("eps", c_void_p),
        ("eps_class_stride", c_int64),
        ("eps_channel_stride", c_int64),
        ("state", c_void_p),
        ("state_stride", c_int64),
    ]


class GaussianAggregateInput(ctypes.Structure):
    _fields_ = [
        ("table", GaussianTableInput),
        ("kind", c_int),
        ("logits", c_void_p),
        ("logits_strides", MapStrides),
        ("batch", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("channels_last", c_bool),
        ("scratch", c_void_p),
    ]


class GaussianAggregateHost:
    """The ops with the signatures of torch.ops.mcibi_fast_cuda; results start as NaN."""

    def __init__(self, kernels: HostKernels) -> None:
        self.kernels = kernels
        for name in ("gaussian_table", "gaussian_aggregate", "gaussian_aggregate_backward"):
            getattr(kernels.cdll, f"host_{name}").restype = ctypes.c_char_p

    def set_device(self, processors: int, kilobytes: int) -> None:
        """Multiprocessors, and shared memory for a block and for a multiprocessor."""
        for attribute, value in ((16, processors), (97, kilobytes), (81, kilobytes + 1)):
            scale = 1 if attribute == 16 else 1024
            self.kernels.cdll.host_set_device_attribute(attribute, value * scale)

    def gaussian_table(self, memory: Tensor, channels: int, noise: Tensor) -> Tensor:
        dtype = noise.dtype if noise.is_floating_point() else torch.float32
        table = torch.full((len(memory), channels), torch.nan, dtype=dtype)
        self._call("gaussian_table", _table(memory, channels, noise), table)
        return table

    def gaussian_aggregate(
        self, logits: Tensor, memory: Tensor, channels: int, noise: Tensor, hard: bool = False
    ) -> tuple[Tensor, Tensor]:
        batch, _, height, width = logits.shape
        out = _like(logits, channels)
        lse = torch.full((batch, height * width), torch.nan, dtype=_wide(logits.dtype))
        inputs = _aggregate(logits, memory, channels, noise)
        self._call("gaussian_aggregate", inputs, c_bool(hard), out, lse)
        return out, lse

    def gaussian_aggregate_backward(
        self, grad: Tensor, logits: Tensor, lse: Tensor, memory: Tensor, noise: Tensor
    ) -> Tensor:
        grad_logits = _like(logits, logits.shape[1])
        inputs = _aggregate(logits, memory, grad.shape[1], noise)
        strides = MapStrides(*grad.stride())
        self._call("gaussian_aggregate_backward", inputs, lse, grad, strides, grad_logits)
        return grad_logits

    def _call(self, name: str, *arguments: object) -> None:
        """Tensors go as pointers to their data, structures as pointers to themselves."""
        pointers = [
            c_void_p(a.data_ptr())
            if isinstance(a, Tensor)
            else ctypes.byref(a)
            if isinstance(a, ctypes.Structure)
            else a
            for a in arguments
        ]
        error = getattr(self.kernels.cdll, f"host_{name}")(*pointers)
        if error is not None:
            raise RuntimeError(error.decode())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _channels_last(logits: Tensor) -> bool:
    last = logits.is_contiguous(memory_format=torch.channels_last)
    return last and not logits.is_contiguous()


def _like(logits: Tensor, channels: int) -> Tensor:
    """Full of NaN, in the layout of the logits."""
    batch, _, height, width = logits.shape
    result = torch.full((batch, channels, height, width), torch.nan, dtype=logits.dtype)
    last = _channels_last(logits)
    return result.contiguous(memory_format=torch.channels_last) if last else result


def _table(memory: Tensor, channels: int, noise: Tensor) -> GaussianTableInput:
    eps = noise if noise.is_floating_point() else None
    return GaussianTableInput(
        memory.data_ptr(),
        FLOATS.index(memory.dtype),
        *memory.stride(),
        len(memory),
        channels,
        FLOATS.index(torch.float32 if eps is None else eps.dtype),
        None if eps is None else eps.data_ptr(),
        *((0, 0) if eps is None else eps.stride()),
        noise.data_ptr() if eps is None else None,
        noise.stride(0) if eps is None else 0,
    )


def _aggregate(
    logits: Tensor, memory: Tensor, channels: int, noise: Tensor
) -> GaussianAggregateInput:
    batch, _, height, width = logits.shape
    return GaussianAggregateInput(
        _table(memory, channels, noise),
        FLOATS.index(logits.dtype),
        logits.data_ptr(),
        MapStrides(*logits.stride()),
        batch,
        height,
        width,
        _channels_last(logits),
    )
