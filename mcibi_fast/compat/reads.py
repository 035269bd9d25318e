"""What can be computed of upsampled logits without forming them, exactly as PyTorch has it.

Each function here has the arguments of PyTorch's function, with an `upsampled.Upsampled` for the
input, and returns NotImplemented where it needs its values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcibi_fast import ops
from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.nn.bilinear import upsampling_taps
from mcibi_fast.ops.upsample_cross_entropy import REDUCTIONS

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cross_entropy(input: Any, *args: Any, **kwargs: Any) -> Any:
    """Of logits (B, K, H, W) and classes (B, H, W)."""
    return NotImplemented if input.how.softmax else _of_logits(input, *args, **kwargs)


def nll_loss(input: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a log-softmax: the cross entropy of the logits."""
    log = input.how.softmax is torch.log_softmax
    return _of_logits(input, *args, **kwargs) if log else NotImplemented


def _of_logits(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if (low := input.source()) is None or not input.how.batched:
        return NotImplemented
    mixed = torch.is_autocast_enabled(low.device.type)
    if (
        size_average is not None
        or reduce is not None
        or type(target) is not Tensor
        or target.dtype != torch.int64
        or target.shape != (len(low), *input.shape[-2:])
        or target.device != low.device
        or reduction not in REDUCTIONS
        or not 0 <= label_smoothing <= 1
        or ignore_index == IGNORE_INDEX < low.shape[1]  # a class to this package's op
        or not _is_constant(weight, low, None if mixed else input.dtype)
    ):
        return NotImplemented
    losses = ops.upsample_cross_entropy(
        low,
        F.pad(target, input.how.margins, value=ignore_index) if any(input.how.margins) else target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none" if reduction == "none" else "sum",
        align_corners=input.how.align_corners,
    )
    if reduction == "none":
        losses = losses[input.how.inside].contiguous()
    elif reduction == "mean":  # PyTorch's: NaN if all pixels are ignored
        kept = target != ignore_index
        if weight is None:
            losses = losses / kept.sum()
        else:
            losses = losses / weight.to(losses.dtype)[target.where(kept, 0)].where(kept, 0).sum()
    return losses if mixed else losses.to(input.dtype)


def _is_constant(weight: Any, low: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether these class weights, if any, are such that the op and PyTorch take."""
    return weight is None or (
        isinstance(weight, Tensor)
        and not weight.requires_grad
        and weight.shape == (low.shape[1],)
        and weight.device == low.device
        and (weight.dtype == dtype if dtype else weight.dtype in FLOATS)
    )


def argmax(input: Any, dim: Any = None, keepdim: bool = False, **others: Any) -> Any:
    """Over the classes. A softmax does not change it."""
    if over_classes(input, dim) is None or others:
        return NotImplemented
    return _part(input, _classes(input), keepdim)


def maximum(input: Any, dim: Any = None, keepdim: bool = False, **others: Any) -> Any:
    """``max`` over the classes."""
    if over_classes(input, dim) is None or others:
        return NotImplemented
    classes = _classes(input)
    values = _part(input, _values_at(input, classes), keepdim)
    return torch.return_types.max((values, _part(input, classes, keepdim)))


def topk(input: Any, k: int, dim: int = -1, largest: bool = True, *args: Any, **out: Any) -> Any:
    """Of one class for each pixel."""
    out.pop("sorted", None)
    if k != 1 or not largest or (found := maximum(input, dim, True, **out)) is NotImplemented:
        return NotImplemented
    return torch.return_types.topk((found.values, found.indices))


def over_classes(input: Any, dim: Any) -> Tensor | None:
    """What can be read instead of the values to reduce over the classes, if anything can."""
    known = type(dim) is int and dim in (-3, input.dim() - 3)
    return input.source() if known else None


def _part(input: Any, found: Tensor, keepdim: bool) -> Tensor:
    """Of a number for each pixel of the whole image, (B, H, W), those that the stand-in has."""
    found = found[input.how.inside].contiguous()
    found = found if input.how.batched else found[0]
    return found.unsqueeze(-3) if keepdim else found


def _classes(input: Any) -> Tensor:
    """(B, H, W), of the whole image."""
    how = input.how
    return ops.upsample_argmax(input.low.detach(), how.size, align_corners=how.align_corners)


def _values_at(input: Any, classes: Tensor) -> Tensor:
    """The values at one class for each pixel, (B, H, W), of the whole image.

    A log-softmax of logits is minus the cross entropy with that class.
    """
    low, align_corners, softmax = (
        input.low.to(input.dtype),
        input.how.align_corners,
        input.how.softmax,
    )
    if softmax is not None:
        logs = -ops.upsample_cross_entropy(
            low, classes, ignore_index=-1, reduction="none", align_corners=align_corners
        ).to(low.dtype)
        return logs if softmax is torch.log_softmax else logs.exp()
    flat, size = low.flatten(1), classes.shape[-2:]
    taps = upsampling_taps((low.shape[2], low.shape[3]), size, align_corners, low)
    first = classes * (low.shape[2] * low.shape[3])
    values = sum(
        flat.gather(1, (first + at).flatten(1)) * weight.flatten() for at, weight in taps.corners
    )
    assert isinstance(values, Tensor)
    return values.reshape(classes.shape)


READS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: cross_entropy,
    F.nll_loss: nll_loss,
    torch.argmax: argmax,
    Tensor.argmax: argmax,
    torch.max: maximum,
    Tensor.max: maximum,
    torch.topk: topk,
    Tensor.topk: topk,
}
