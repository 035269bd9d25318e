"""What goes on around a call of an op: modes, transforms and tracing."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
_NO_TENSOR = (float, bool, int, type(None))  # isinstance(x, Tensor) takes as long as all the rest
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
_AUTOCAST = AUTOCAST.raw_repr()
_include = torch._C._dispatch_tls_local_include_set
_exclude = torch._C._dispatch_tls_local_exclude_set


def follows(*args: Any) -> bool:
    """Whether forward mode or a ``torch.func`` transform differentiates in one of the arguments."""
    transformed = torch._C._are_functorch_transforms_active()
    tensors = [a for a in args if isinstance(a, Tensor)]
    # Code that a compiler traces enters forward mode without setting the level in Python.
    if not transformed and forward_ad._current_level < 0 and eager(tensors):
        return False
    if transformed and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    return any(forward_ad.unpack_dual(t, level=0).tangent is not None for t in tensors)


def _plain_threads() -> frozenset[tuple[int, int]]:
    """The dispatch keys that a thread without modes adds and leaves out, outside and inside
    ``torch.inference_mode``."""
    threads = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            threads.add(_thread_keys())
    return frozenset(threads)


def _thread_keys() -> tuple[int, int]:
    """Those of autocast count as left out."""
    return _include().raw_repr(), _exclude().raw_repr() | _AUTOCAST


def in_autocast() -> bool:
    """Whether this thread is in an autocast block, of the CPU or of CUDA."""
    return _exclude().raw_repr() & _AUTOCAST != _AUTOCAST


with ThreadPoolExecutor(1) as _new_thread:  # whatever modes this module is imported in
    _PLAIN_THREADS = _new_thread.submit(_plain_threads).result()


def direct(args: Sequence[Any]) -> bool:
    """Whether a call needs nothing of PyTorch's dispatcher: its tensors are dense and on the CPU or
    CUDA, nothing is traced or transformed, and there is no mode except autocast, which the ops
    follow by themselves."""
    if torch.compiler.is_compiling() or torch._C._is_torch_function_mode_enabled():
        return False
    if forward_ad._current_level >= 0 or _thread_keys() not in _PLAIN_THREADS:
        return False
    for arg in args:
        kind = type(arg)
        if kind in _PLAIN:
            if not _dense(arg):
                return False
        elif kind not in _NO_TENSOR and isinstance(arg, Tensor):
            return False
    return True


def _dense(tensor: Tensor) -> bool:
    # The attributes take a fifth of the time of the tensor's dispatch keys.
    if not (tensor.is_cpu or tensor.is_cuda) or tensor.layout is not torch.strided:
        return False
    return not (tensor.is_neg() or tensor.is_nested)


def eager(args: Sequence[Any]) -> bool:
    """True where real tensors are computed; while tracing they are of other classes."""
    return all(type(a) in _PLAIN for a in args if isinstance(a, Tensor))
