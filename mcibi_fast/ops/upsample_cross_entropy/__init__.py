"""Cross entropy of bilinearly upsampled logits (Eqs. 14 and 15), the upsampled logits never formed.

With l the interpolated logits of a pixel, y its label, w the class weights, s the label smoothing
and lse = log sum_k exp(l_k), its loss is (1 - s) w_y (lse - l_y) + s / K sum_k w_k (lse - l_k). The
kernels interpolate a few pixels at a time and reduce them over the classes; the backward does so
again and applies the adjoint of the interpolation on the chip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.ops import checks
from mcibi_fast.ops.compiled import cpu_kernel, cuda_kernel
from mcibi_fast.ops.dispatch import Kernel, Op, always, follows, recompute_gradients
from mcibi_fast.ops.labels import without_bad_labels
from mcibi_fast.ops.upsample_cross_entropy import reference

REDUCTIONS = ("none", "sum", "mean")


def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """``F.cross_entropy(F.interpolate(logits, labels.shape[-2:], mode="bilinear"), labels)``.

    Differentiable once, in the logits. Allocates two numbers per label (three on CUDA) and, in the
    backward, the gradient; nothing of K times the size of the labels. The same inputs give the same
    bits in every run and with any number of threads, unless a compiler replaces the last reduction
    with its own. A pixel that is ignored, or whose loss gets the gradient 0, contributes nothing,
    whatever its logits (PyTorch multiplies NaN by 0).

    Args:
        logits: (B, K, h, w), float32, float64, bfloat16 or float16, any strides. Computed in
            float32 (float64), under autocast too.
        labels: (B, H, W), any integer dtype and strides; H and W need not be multiples of h and w.
        weight: w, (K,) floats, of each class; None for ones. Not learnt.
        ignore_index: the label of pixels that do not count. With more than 255 classes the default
            is an error: 255 is then a class.
        label_smoothing: s, between 0 and 1: the share of the target spread over all classes.
        reduction: "none" for the loss of each pixel (0 where ignored), "sum", or "mean": the sum
            over the sum of w_y over the valid pixels. Without a valid pixel that is 0; valid
            pixels whose weights are all 0 give NaN, as in PyTorch.
        align_corners: of the bilinear upsampling, as in ``torch.nn.functional.interpolate``.

    Returns:
        A scalar, or (B, H, W) for "none"; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument has the wrong type, value, shape, dtype or device, or (at
            once on the CPU; on CUDA see ``check_labels``) a label is outside [0, K).
    """
    args = _prepare(logits, labels, weight, ignore_index, label_smoothing, reduction, align_corners)
    losses = CROSS_ENTROPY(*args)[0]
    if reduction == "none":
        return losses
    if reduction == "sum":
        return _total(losses)
    return _mean(losses, labels, args[2], ignore_index, logits.shape[1])


def _total(values: Tensor) -> Tensor:
    """The sum of (B, H, W), row by row: PyTorch splits a sum of all among threads, not a row's."""
    return values.sum(-1).sum(-1).sum() if values.is_cpu else values.sum()


def _mean(
    losses: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, num_classes: int
) -> Tensor:
    labels = labels.long()  # their own dtype may be too small for K or ignore_index
    valid = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    if weight is None:
        return _total(losses) / valid.sum().clamp(min=1)
    weights = _total(weight.detach()[labels.where(valid, 0)].where(valid, 0))
    return _total(losses) / weights.where(weights != 0, torch.nan).where(valid.any(), 1)


def _prepare(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    align_corners: bool,
) -> tuple[Any, ...]:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is none of {', '.join(REDUCTIONS)}")
    checks.logits_and_labels(logits, labels)
    checks.ignore_index(ignore_index, logits.shape[1])
    label_smoothing = checks.fraction("label_smoothing", label_smoothing)
    if weight is not None:
        checks.tensor("weight", weight, "K", checks.FLOATS)
        if weight.shape[0] != logits.shape[1]:
            raise ValueError(
                f"weight: expected one for each of the {logits.shape[1]} classes, "
                f"got {weight.shape[0]}"
            )
        checks.same_device(logits=logits, weight=weight)
        weight = weight.to(checks.wide(logits.dtype)).contiguous()
    return logits, labels, weight, ignore_index, label_smoothing, align_corners


# --- the operators ------------------------------------------------------------------------------


def _reference(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    known = without_bad_labels(labels, logits.shape[1], ignore_index, "upsample_cross_entropy")
    weight = None if weight is None else weight.detach()
    losses, lse = reference.upsample_cross_entropy(
        logits, known, weight, label_smoothing, align_corners
    )
    return losses, torch.stack([lse, torch.ones_like(lse)]) if logits.is_cuda else lse


def _fake(logits: Tensor, labels: Tensor, *_args: Any) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(labels.shape, dtype=checks.wide(logits.dtype))
    return losses, losses.new_empty((2, *losses.shape) if logits.is_cuda else losses.shape)


CROSS_ENTROPY = Op(
    "upsample_cross_entropy",
    [cuda_kernel, cpu_kernel, Kernel("reference", _reference, always, composite=True)],
    _fake,
    public=upsample_cross_entropy,
    prepare=_prepare,
)


def _layout(logits: Tensor) -> torch.memory_format:
    """The rule of the kernels: channels_last unless the tensor is also contiguous."""
    if logits.is_contiguous() or not logits.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _backward_reference(
    grad_losses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *options: Any
) -> Tensor:
    def losses(l: Tensor) -> Tensor:
        return _reference(l, labels, *options)[0]

    (grad,) = recompute_gradients(losses, [logits], grad_losses)
    return grad.contiguous(memory_format=_layout(logits))


CROSS_ENTROPY_BACKWARD = Op(
    "upsample_cross_entropy_backward",
    [cuda_kernel, cpu_kernel, Kernel("reference", _backward_reference, always)],
    lambda grad_losses, logits, *_: torch.empty_like(logits, memory_format=_layout(logits)),
)
CROSS_ENTROPY_BACKWARD.refuse_gradient()


class UpsampleCrossEntropy(torch.autograd.Function):
    """Saves the logits, the labels and a statistic per label; the softmax is formed again."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, weight: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        losses, lse = CROSS_ENTROPY.below_autograd(logits, labels, weight, *options)
        ctx.save_for_backward(logits, labels, lse, weight)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return losses, lse

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, _lse: Tensor) -> tuple[Any, ...]:
        grad = CROSS_ENTROPY_BACKWARD(grad_losses, *ctx.saved_tensors, *ctx.options)
        return grad, None, None, None, None, None


def _transformed(logits: Tensor, labels: Tensor, weight: Tensor | None, *options: Any) -> Any:
    if weight is not None and follows(weight):
        raise RuntimeError("upsample_cross_entropy: has no derivative with respect to weight")
    return _reference(logits, labels, weight, *options)


CROSS_ENTROPY.differentiable(
    UpsampleCrossEntropy.apply, lambda logits, *_: logits.requires_grad, _transformed
)
