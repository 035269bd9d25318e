"""Cross entropy of bilinearly upsampled logits (Eqs. 14 and 15), the upsampled logits never formed.

With l the interpolated logits of a pixel, y its label, w the class weights, s the label smoothing
and lse = log sum_k exp(l_k), its loss is (1 - s) w_y (lse - l_y) + s / K sum_k w_k (lse - l_k). The
kernels interpolate a few pixels at a time and reduce them over the classes; the backward does so
again and applies the adjoint of the interpolation on the chip. On the CPU the gradient of a sum or
mean is computed with the loss, so that the exponentials are taken once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.ops import checks, measured
from mcibi_fast.ops.compiled import cpu_kernel, cuda_kernel
from mcibi_fast.ops.dispatch import (
    Kernel,
    Op,
    always,
    no_gradient_of,
    recompute_gradients,
    refuse,
)
from mcibi_fast.ops.labels import without_bad_labels
from mcibi_fast.ops.layout import layout
from mcibi_fast.ops.modes import direct, follows
from mcibi_fast.ops.upsample_cross_entropy import reference

REDUCTIONS = ("none", "sum", "mean")
# The limits of one pass on CUDA; benchmarks/NOTES.md has the counts of instructions behind them.
ONE_PASS_CLASSES = 192  # of a warp, whose lanes have six classes each
ONE_PASS_SCALE = 4  # labels for each logit, in either direction


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

    Differentiable once, in the logits. Allocates two numbers per label (three on CUDA, or two bytes
    where it computes loss and gradient in one pass) and the gradient, for "sum" and "mean" in the
    forward already if one is wanted (in float32; on CUDA as 1.2 to 1.4 times as many sums), and in
    the backward once more for 16-bit logits, on CUDA, or where the graph is kept; nothing of K
    times the size of the labels. The same inputs give
    the same bits in every run and with any number of threads, unless a compiler replaces the last
    reduction with its own. A pixel that is ignored, or whose loss gets the gradient 0, contributes
    nothing, whatever its logits (PyTorch multiplies NaN by 0).

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
    if reduction == "none":
        return CROSS_ENTROPY.first(*args)
    mean = reduction == "mean"
    if direct(args):
        with_grad = measured.wants_gradient(logits)
        if logits.is_cpu:
            with_grad = with_grad and not measured.is_reduced(logits, labels)
            return REDUCED.run_directly((*args, mean, with_grad), only_first=True)
        if with_grad and why_not_one_pass(logits, labels) is None:
            return REDUCED.run_directly((*args, mean, with_grad), only_first=True)
    return _reduce(CROSS_ENTROPY(*args)[0], logits, labels, args[2], ignore_index, mean)


def why_not_one_pass(logits: Tensor, labels: Tensor) -> str | None:
    """Why CUDA does not compute the reduced loss with its gradient in one pass; None where it does.

    Otherwise the losses of all pixels are computed first, and the backward forms their softmax
    again. That is also what happens where no gradient is wanted, and where PyTorch's dispatcher is
    needed (compilers, ``torch.func``, forward mode, autocast).
    """
    if logits.dtype == torch.float64:
        return "float64: its exponentials take twice the registers, and speed does not matter"
    if logits.shape[1] > ONE_PASS_CLASSES:
        return f"more than {ONE_PASS_CLASSES} classes: their exponentials do not fit the registers"
    sizes = zip(labels.shape[1:], logits.shape[2:], strict=True)
    if any(n < ONE_PASS_SCALE * m for n, m in sizes):
        scale = f"{ONE_PASS_SCALE} x {ONE_PASS_SCALE}"
        return f"fewer than {scale} labels for each logit: it works on columns of eight pixels"
    return None


def _reduce(
    losses: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    mean: bool,
) -> Tensor:
    """The sum of the losses over a divisor; a compiler can fuse all of it."""
    total = _total(losses)
    if not mean:
        return total
    labels = labels.long()  # their own dtype may be too small for K or ignore_index
    valid = (labels >= 0) & (labels < logits.shape[1]) & (labels != ignore_index)
    if weight is None:
        divisor = valid.sum().clamp(min=1).to(total.dtype)
    else:
        weights = _total(weight.detach()[labels.where(valid, 0)].where(valid, 0))
        divisor = weights.where(weights != 0, torch.nan).where(valid.any(), 1)
    return total / divisor


def _total(values: Tensor) -> Tensor:
    """The sum of (B, H, W), row by row: PyTorch splits a sum of all among threads, not a row's."""
    return values.sum(-1).sum(-1).sum() if values.is_cpu else values.sum()


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


def _backward_reference(
    grad_losses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *options: Any
) -> Tensor:
    def losses(l: Tensor) -> Tensor:
        return _reference(l, labels, *options)[0]

    (grad,) = recompute_gradients(losses, [logits], grad_losses)
    return grad.contiguous(memory_format=layout(logits))


CROSS_ENTROPY_BACKWARD = Op(
    "upsample_cross_entropy_backward",
    [cuda_kernel, cpu_kernel, Kernel("reference", _backward_reference, always)],
    lambda grad_losses, logits, *_: torch.empty_like(logits, memory_format=layout(logits)),
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
        no_gradient_of(ctx, lse)
        return losses, lse

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor | None, _lse: None) -> tuple[Any, ...]:
        if grad_losses is None:
            return (None,) * 6
        grad = CROSS_ENTROPY_BACKWARD(grad_losses, *ctx.saved_tensors, *ctx.options)
        return grad, None, None, None, None, None


def _transformed(logits: Tensor, labels: Tensor, weight: Tensor | None, *options: Any) -> Any:
    if weight is not None and follows(weight):
        raise RuntimeError("upsample_cross_entropy: has no derivative with respect to weight")
    return _reference(logits, labels, weight, *options)


CROSS_ENTROPY.differentiable(
    UpsampleCrossEntropy.apply, lambda logits, *_: logits.requires_grad, _transformed
)


# --- the reduced loss of eager calls -------------------------------------------------------------


def _reduced_reference(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    mean: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    losses, _ = _reference(logits, labels, weight, ignore_index, label_smoothing, align_corners)
    loss = _reduce(losses, logits, labels, weight, ignore_index, mean)
    return loss, loss.new_empty(0)  # PyTorch's autograd goes through the loss


def _reduced_fake(logits: Tensor, labels: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """As on the CPU. Nothing that is traced calls the operator."""
    wide = checks.wide(logits.dtype)
    grad = torch.empty_like(logits, dtype=wide, memory_format=layout(logits))
    return grad.new_empty(()), grad if args[-1] else grad[:0]


REDUCED = Op(
    "upsample_cross_entropy_reduced",
    [cuda_kernel, cpu_kernel, Kernel("reference", _reduced_reference, always, composite=True)],
    _reduced_fake,
)
# For CUDA alone, where the second result of REDUCED is sums over tiles instead of the gradient: it
# adds them up and multiplies them by the cotangent.
GATHER = Op(
    "upsample_cross_entropy_gather",
    [cuda_kernel],
    lambda _grad_loss, _sums, logits, *_: torch.empty_like(logits, memory_format=layout(logits)),
)
GATHER.refuse_gradient()


class ReducedUpsampleCrossEntropy(torch.autograd.Function):
    """Computes the gradient with the loss, while the softmax is at hand, and saves it.

    It is saved in float32 for 16-bit logits too, because a loss scaler's factor comes later.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, weight: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        loss, saved = REDUCED.run_below_autograd((logits, labels, weight, *options))
        ctx.save_for_backward(saved, logits)
        ctx.size = labels.shape[1:]
        no_gradient_of(ctx, saved)
        return loss, saved

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _saved: None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 8
        saved, logits = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _Scaled.apply(saved, grad, logits, ctx.size), *[None] * 7
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()
        return _scaled(saved, grad, logits, ctx.size, in_place), *[None] * 7


class DeferredUpsampleCrossEntropy(torch.autograd.Function):
    """Saves the logits and the labels; the softmax is formed again."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, weight: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        loss, no_grad = REDUCED.run_below_autograd((logits, labels, weight, *options))
        ctx.save_for_backward(logits, labels, weight)
        ctx.options = options[:-1]
        no_gradient_of(ctx, no_grad)
        return loss, no_grad

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _no_grad: None) -> tuple[Any, ...]:
        if grad_loss is None:
            return (None,) * 8
        return REDUCED_BACKWARD(grad_loss, *ctx.saved_tensors, *ctx.options), *[None] * 7


def _reduced_backward_reference(
    grad_loss: Tensor, logits: Tensor, labels: Tensor, *options: Any
) -> Tensor:
    def loss(l: Tensor) -> Tensor:
        return _reduced_reference(*(l, labels, *options, False))[0]

    (grad,) = recompute_gradients(loss, [logits], grad_loss)
    return grad.contiguous(memory_format=layout(logits))


REDUCED_BACKWARD = Op(
    "upsample_cross_entropy_reduced_backward",
    [cpu_kernel, Kernel("reference", _reduced_backward_reference, always)],
    lambda grad_loss, logits, *_: torch.empty_like(logits, memory_format=layout(logits)),
)
REDUCED_BACKWARD.refuse_gradient()


def _scaled(
    saved: Tensor, grad: Tensor, logits: Tensor, size: tuple[int, int], in_place: bool = False
) -> Tensor:
    """The saved gradient times the cotangent, in place where the graph is not kept.

    A loss that does not count has no gradient, whatever its logits, nor have ignored pixels.
    """
    if logits.is_cuda:
        return GATHER.below_autograd(grad, saved, logits, *size)
    if direct((grad, saved)) and (factor := grad.item()) and math.isfinite(factor):
        if in_place:
            scaled = saved if factor == 1 else saved.mul_(factor)
        else:
            scaled = saved * factor
    else:
        scaled = torch.where((grad != 0) & (saved != 0), saved * grad, 0)
    return scaled if logits.dtype == scaled.dtype else scaled.to(logits.dtype)


class _Scaled(torch.autograd.Function):
    """Under ``create_graph``: the gradient raises when it is to be differentiated in turn."""

    @staticmethod
    def forward(
        ctx: Any, saved: Tensor, grad: Tensor, logits: Tensor, size: tuple[int, int]
    ) -> Tensor:
        return _scaled(saved, grad, logits, size)

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> Any:
        refuse("upsample_cross_entropy_backward")


def _reduced_with_gradient(*args: Any) -> tuple[Tensor, Tensor]:
    with_grad = args[-1]
    chosen = ReducedUpsampleCrossEntropy if with_grad else DeferredUpsampleCrossEntropy
    return chosen.apply(*args)


REDUCED.differentiable(
    _reduced_with_gradient, lambda logits, *_: logits.requires_grad, _reduced_reference
)
