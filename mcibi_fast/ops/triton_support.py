"""Whether the Triton kernels of an op can run; imports no Triton itself."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_missing(tensor: Tensor, channels: int, most: int) -> str | None:
    """Why no Triton kernel can run on tensors like this one, or None where one can.

    Args:
        tensor: one of the op's tensors; the others have its dtype and device.
        channels: the widest row that a kernel would hold.
        most: the widest that the op's kernels can.
    """
    if not _installed():
        return "Triton is not installed"
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels have no {str(tensor.dtype).removeprefix('torch.')}"
    if channels > most:
        return f"rows of {channels} channels; its kernels hold at most {most}"
    if tensor.device.type == "cuda":
        return _gpu_too_old(tensor.device)
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"a tensor is on {tensor.device.type}, not on cuda"
    if tensor.dtype == torch.bfloat16:
        return "its interpreter computes bfloat16 wrongly"
    return None


@functools.cache
def _gpu_too_old(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor}; its kernels need 8.0"
    return None
