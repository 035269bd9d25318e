"""The launchers of upsample_argmax and upsample_confusion on the host executor, with tensors for
arguments."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_int64, c_void_p

import torch
from torch import Tensor

from tests.csrc.host_kernels import HostKernels
from tests.csrc.memory_update_host import label_flag
from tests.csrc.upsample_cross_entropy_host import label_map, logit_map

DEVICE_SHARED_BYTES = 97  # cudaDevAttrMaxSharedMemoryPerBlockOptin


class UpsampleArgmaxHost:
    """The ops with the signatures of torch.ops.mcibi_fast_cuda; results start as nonsense."""

    def __init__(self, kernels: HostKernels) -> None:
        self.kernels = kernels
        for name in ("upsample_argmax", "upsample_confusion"):
            getattr(kernels.cdll, f"host_{name}").restype = ctypes.c_char_p

    def upsample_argmax(
        self, logits: Tensor, height: int, width: int, align_corners: bool = False
    ) -> Tensor:
        prediction = torch.full((len(logits), height, width), -(2**60))
        self._call(
            "upsample_argmax",
            ctypes.byref(logit_map(logits)),
            c_int64(height),
            c_int64(width),
            c_bool(align_corners),
            c_void_p(prediction.data_ptr()),
        )
        return prediction

    def upsample_confusion(
        self,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int = 255,
        align_corners: bool = False,
        flag: Tensor | None = None,
    ) -> Tensor:
        K = logits.shape[1]
        confusion = torch.full((K, K), -(2**60))
        self._call(
            "upsample_confusion",
            ctypes.byref(logit_map(logits)),
            ctypes.byref(label_map(labels, K, ignore_index)),
            c_bool(align_corners),
            c_void_p(confusion.data_ptr()),
            ctypes.byref(label_flag(flag, "upsample_confusion")),
        )
        return confusion

    def set_shared_memory(self, kilobytes: int) -> None:
        """What the device gives a block."""
        self.kernels.cdll.host_set_device_attribute(DEVICE_SHARED_BYTES, kilobytes * 1024)

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self.kernels.cdll, f"host_{name}")(*arguments)
        if error is not None:
            raise RuntimeError(error.decode())
