"""What gives another stand-in of a stand-in for upsampled logits: views, copies, a softmax.

Each function here has the arguments of PyTorch's function, with an `upsampled.Upsampled` for the
input, and returns NotImplemented where that needs its values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcibi_fast.compat.reads import FLOATS, over_classes

# --- parts and shapes -----------------------------------------------------------------------------


def detach(input: Any) -> Any:
    if (low := input.source()) is None:
        return NotImplemented
    return input.share(low.detach(), torch.detach)


def getitem(input: Any, index: Any) -> Any:
    """An image or some of them, all their classes, and a rectangle of their pixels."""
    parts = list(index) if isinstance(index, tuple) else [index]
    dots = [i for i, part in enumerate(parts) if part is ...]
    if parts[0] is None:
        return unsqueeze(input, 0) if parts[1:] in ([], [...]) else NotImplemented
    if len(dots) > 1 or len(parts) - len(dots) > input.dim():
        return NotImplemented
    at = dots[0] if dots else len(parts)
    missing = [slice(None)] * (input.dim() - len(parts) + len(dots))
    parts = [*parts[:at], *missing, *parts[at + 1 :]]
    image, classes, *pixels = parts if input.how.batched else [slice(None), *parts]
    if (low := input.source()) is None or _steps(classes, low.shape[1]) != (0, low.shape[1]):
        return NotImplemented
    kept = [_steps(part, length) for part, length in zip(pixels, input.shape[-2:], strict=True)]
    if None in kept:
        return NotImplemented
    rows, columns = (
        slice(whole.start + part[0], whole.start + part[1])
        for whole, part in zip(input.how.window, kept, strict=True)
        if part is not None
    )
    if type(image) is int and -len(low) <= image < len(low):
        low, batched = low[image].unsqueeze(0), False
    elif type(image) is slice and len(low[image]):
        low, batched = low[image], input.how.batched
    else:
        return NotImplemented
    return input.share(low, lambda x: x[index], window=(rows, columns), batched=batched)


def _steps(index: Any, length: int) -> tuple[int, int] | None:
    """From where to where a slice goes; None if it is none, is empty or leaves something out."""
    if type(index) is not slice:
        return None
    start, stop, step = index.indices(length)
    return (start, stop) if step == 1 and start < stop else None


def unbind(input: Any, dim: int = 0) -> Any:
    if dim not in (0, -4) or not input.how.batched or input.source() is None:
        return NotImplemented
    return tuple(getitem(input, image) for image in range(len(input)))


def unsqueeze(input: Any, dim: int) -> Any:
    if dim not in (0, -4) or input.how.batched:
        return NotImplemented
    return reshape(input, (1, *input.shape))


def squeeze(input: Any, dim: Any = None) -> Any:
    ones = [i for i, length in enumerate(input.shape) if length == 1]
    if ones != [0] or dim not in (None, 0, -4, (0,)) or not input.how.batched:
        return NotImplemented
    return reshape(input, input.shape[1:])


def reshape(input: Any, *given: Any, shape: Any = ()) -> Any:
    """To the shape that it has, with or without a first dimension of 1."""
    asked = _numbers(given or (shape,))
    if (low := input.source()) is None:
        return NotImplemented
    batched = len(asked) == 4
    result = (len(low), *input.shape[-3:])[not batched :]
    filled = tuple(n if given == -1 else given for given, n in zip(asked, result, strict=False))
    if len(asked) != len(result) or filled != result or asked.count(-1) > 1:
        return NotImplemented
    if not batched and len(low) > 1:
        return NotImplemented
    return input.share(low, lambda x: x.reshape(result), batched=batched)


def _numbers(given: tuple[Any, ...]) -> tuple[int, ...]:
    """The integers of a call's arguments, given one by one or as a sequence; () if others are."""
    first = given[0]
    numbers = tuple(first) if len(given) == 1 and isinstance(first, (tuple, list)) else given
    return numbers if all(type(number) is int for number in numbers) else ()


def flip(input: Any, *given: Any, dims: Any = ()) -> Any:
    """Of rows or columns: upsampling treats both ends of them alike."""
    asked = _numbers(given or (dims,))
    if (low := input.source()) is None or not asked:
        return NotImplemented
    flipped = {dim if dim < 0 else dim - input.dim() for dim in asked}
    if not flipped <= {-1, -2} or len(flipped) != len(asked):
        return NotImplemented
    rows, columns = (
        slice(length - part.stop, length - part.start) if dim in flipped else part
        for dim, length, part in zip((-2, -1), input.how.size, input.how.window, strict=True)
    )
    return input.share(low.flip(*flipped), lambda x: x.flip(*flipped), window=(rows, columns))


# --- copies ---------------------------------------------------------------------------------------


def to(input: Any, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    try:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    except (RuntimeError, TypeError):  # copy=True
        return NotImplemented
    if memory_format is not None or (dtype is not None and dtype not in FLOATS):
        return NotImplemented
    dtype, device = dtype or input.dtype, device or input.device
    if (dtype, torch.empty(0, device=device).device) == (input.dtype, input.device):
        return input if input._value is None else NotImplemented
    return input.copy(dtype, device)


def clone(input: Any, **options: Any) -> Any:
    return NotImplemented if options else input.copy(input.dtype, input.device)


def contiguous(input: Any, **options: Any) -> Any:
    same = input._value is None and input.is_contiguous(**options)
    return input if same else NotImplemented


def like(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``new_tensor`` and the like, which read the dtype and the device alone."""

    def new(input: Any, *args: Any, **kwargs: Any) -> Tensor:
        return method(torch.empty(0, dtype=input.dtype, device=input.device), *args, **kwargs)

    return new


# --- what changes the values ----------------------------------------------------------------------


def softmax_by(softmax: Callable[..., Tensor]) -> Callable[..., Any]:
    """``softmax`` or ``log_softmax`` over the classes."""

    def run(
        input: Any, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
    ) -> Any:
        if over_classes(input, dim) is None or input.how.softmax is not None:
            return NotImplemented
        one = torch.empty(1, dtype=input.dtype, device=input.device)
        dtype = softmax(one, 0, dtype=dtype).dtype  # which autocast may choose
        waiting = input if dtype == input.dtype else input.copy(dtype, input.device)
        low = waiting.source()
        assert low is not None
        return waiting.share(low, lambda x: softmax(x, -3), softmax=softmax)

    return run


def interpolate(input: Any, *args: Any, **kwargs: Any) -> Any:
    """To the size that it has; to another one from its values, and that waits again."""
    asked = bilinear_arguments(input, *args, **kwargs)
    if asked is None:
        return NotImplemented
    if asked[0] == tuple(input.shape[-2:]):
        return input.copy(input.dtype, input.device)
    return input.again(*asked)


def bilinear_arguments(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> tuple[tuple[int, int], bool] | None:
    """The size and align_corners of a call of ``F.interpolate``; None if it is of another kind.

    Of another kind is also a scale factor that does not give whole numbers of rows and columns:
    PyTorch then interpolates by the factor, not by the ratio of the sizes.
    """
    if mode != "bilinear" or antialias or input.dim() != 4:
        return None
    asked = scale_factor if size is None else size
    pair = tuple(asked) if isinstance(asked, (tuple, list, Tensor)) else (asked, asked)
    if len(pair) != 2:
        return None
    if size is None:
        pair = tuple(n * factor for n, factor in zip(input.shape[2:], pair, strict=True))
    height, width = (int(n) for n in pair)
    return ((height, width), bool(align_corners)) if (height, width) == pair else None


_SOFTMAX, _LOG_SOFTMAX = softmax_by(torch.softmax), softmax_by(torch.log_softmax)
VIEWS: dict[Any, Callable[..., Any]] = {
    torch.detach: detach,
    Tensor.detach: detach,
    Tensor.data.__get__: detach,  # type: ignore[attr-defined]
    Tensor.__getitem__: getitem,
    torch.unbind: unbind,
    Tensor.unbind: unbind,
    torch.unsqueeze: unsqueeze,
    Tensor.unsqueeze: unsqueeze,
    torch.squeeze: squeeze,
    Tensor.squeeze: squeeze,
    torch.reshape: reshape,
    Tensor.reshape: reshape,
    Tensor.view: reshape,
    torch.flip: flip,
    Tensor.flip: flip,
    Tensor.to: to,
    Tensor.type_as: to,
    Tensor.float: lambda input, **options: to(input, torch.float32, **options),
    Tensor.double: lambda input, **options: to(input, torch.float64, **options),
    Tensor.cpu: lambda input, **options: to(input, "cpu", **options),
    Tensor.clone: clone,
    torch.clone: clone,
    Tensor.contiguous: contiguous,
    F.softmax: _SOFTMAX,
    torch.softmax: lambda input, dim, dtype=None: _SOFTMAX(input, dim, dtype=dtype),
    Tensor.softmax: lambda input, dim, dtype=None: _SOFTMAX(input, dim, dtype=dtype),
    F.log_softmax: _LOG_SOFTMAX,
    torch.log_softmax: lambda input, dim, dtype=None: _LOG_SOFTMAX(input, dim, dtype=dtype),
    Tensor.log_softmax: lambda input, dim, dtype=None: _LOG_SOFTMAX(input, dim, dtype=dtype),
    F.interpolate: interpolate,
}
VIEWS |= {
    method: like(method)
    for method in (
        Tensor.new_tensor, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty,
    )
}  # fmt: skip
