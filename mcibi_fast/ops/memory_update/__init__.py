"""Memory update, Eqs. 6-9: the Gaussian of each class follows the features under its mask.

The mean over the full-resolution pixels of the upsampled features is a weighted sum over the
low-resolution ones: with U the bilinear upsampling, sum_{i: GT_i = c} (U R)_i = sum_j A[j, c] R_j
for A = U^T onehot(GT). A has few entries per low-resolution pixel, so the kernels read the labels
once and the features once and upsample nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcibi_fast.defaults import IGNORE_INDEX, MOMENTUM
from mcibi_fast.ops import checks
from mcibi_fast.ops.compiled import cpu_kernel, cuda_kernel
from mcibi_fast.ops.dispatch import (
    Kernel,
    Op,
    always,
    no_gradient_of,
    recompute_gradients,
)
from mcibi_fast.ops.labels import without_bad_labels
from mcibi_fast.ops.memory_update import reference
from mcibi_fast.ops.modes import follows


def class_feature_sums(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sums of the bilinearly upsampled features over the pixels of each class (Eqs. 7-8).

    Differentiable once, in the features. Allocates the results and a sparse matrix of at most one
    weight per low-resolution pixel and class present in its neighbourhood; nothing of the size of
    the label map times the channels.

    Args:
        features: R, (B, Z, h, w), float32, float64, bfloat16 or float16, any strides.
        labels: GT, (B, H, W), any integer dtype and strides; H and W need not be multiples.
        num_classes: K.
        ignore_index: the label that belongs to no class. With more than 255 classes the default is
            an error: 255 is then a class.
        align_corners: of the upsampling, as in ``torch.nn.functional.interpolate``.

    Returns:
        sums (K, Z) in float32 (float64 for float64 features) and counts (K,) int64, in
        full-resolution pixels. The mean vector of Eq. 8 is ``sums / counts``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or (at
            once on the CPU; on CUDA see ``check_labels``) a label is outside [0, K).
    """
    return SUMS(*_prepare_sums(features, labels, num_classes, ignore_index, align_corners))


def memory_update(
    memory: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    momentum: float = MOMENTUM,
    unbiased: bool = False,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The next memory: M_t = (1 - m) M_{t-1} + m T(R) for the classes in the labels (Eqs. 6-9).

    T(R) is the mean and the standard deviation over the Z channels of the class's mean vector.
    The same inputs give the same bits in every run and with any number of threads. Differentiable
    once in the features and the memory, although MCIBI++ does not learn through it.

    Args:
        memory: M, (K, 2) in float32 or float64; column 0 the mean, column 1 the standard
            deviation. Not modified.
        features: R, (B, Z, h, w).
        labels: GT, (B, H, W), any integer dtype.
        momentum: m, between 0 and 1.
        unbiased: divide the variance by Z - 1 (the released form) instead of Z (the paper).
        ignore_index: the label that belongs to no class. With more than 255 classes the default is
            an error: 255 is then a class.
        align_corners: of the bilinear upsampling.
        group: process group over which sums and counts are added up first, so that every rank
            gets what one process with the whole batch would; None for this process alone.

    Returns:
        The next memory, (K, 2), in the memory's dtype. Classes without a pixel keep their row, and
        so do classes whose row would not be finite, as after an overflow in float16; the latter are
        counted, see ``kept_rows``.

    Raises:
        TypeError, ValueError: as ``class_feature_sums``, or the momentum is not in [0, 1].
    """
    args = _prepare_update(
        memory, features, labels, momentum, unbiased, ignore_index, align_corners, group
    )
    if group is None:
        return UPDATE(*args)
    if follows(memory, features):
        raise RuntimeError(
            "memory_update: with a group it cannot be differentiated in forward mode or by "
            "torch.func; the sums of the other ranks have no derivative here"
        )
    sums, counts = SUMS(features, labels, len(memory), ignore_index, align_corners)
    dist.all_reduce(sums, group=group)
    dist.all_reduce(counts, group=group)
    return reference.moving_average(memory, sums, counts, momentum, unbiased)


def _prepare_sums(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, align_corners: bool
) -> tuple[Any, ...]:
    checks.features_and_labels(features, labels)
    checks.positive("num_classes", num_classes)
    checks.ignore_index(ignore_index, num_classes)
    return features, labels, num_classes, ignore_index, align_corners


def _prepare_update(
    memory: Tensor,
    features: Tensor,
    labels: Tensor,
    momentum: float,
    unbiased: bool,
    ignore_index: int,
    align_corners: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Any, ...]:
    checks.memory(memory)
    checks.features_and_labels(features, labels)
    checks.same_device(features=features, memory=memory)
    checks.ignore_index(ignore_index, memory.shape[0])
    momentum = checks.fraction("momentum", momentum)
    if unbiased and features.shape[1] < 2:
        raise ValueError("unbiased: needs at least 2 channels (it divides by Z - 1), got 1")
    return memory, features, labels, momentum, unbiased, ignore_index, align_corners


# --- class_feature_sums -------------------------------------------------------------------------


def _sums_reference(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    known = without_bad_labels(labels, num_classes, ignore_index, "class_feature_sums")
    return reference.class_feature_sums(features, known, num_classes, align_corners)


def _sums_fake(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    dtype = checks.wide(features.dtype)
    sums = features.new_empty((num_classes, features.shape[1]), dtype=dtype)
    return sums, features.new_empty((num_classes,), dtype=torch.int64)


SUMS = Op(
    "class_feature_sums",
    [cuda_kernel, cpu_kernel, Kernel("reference", _sums_reference, always, composite=True)],
    _sums_fake,
    public=class_feature_sums,
    prepare=_prepare_sums,
)


def _sums_backward_reference(
    grad_sums: Tensor,
    labels: Tensor,
    height: int,
    width: int,
    ignore_index: int,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
    num_classes, channels = grad_sums.shape
    features = grad_sums.new_zeros((len(labels), channels, height, width), dtype=dtype)
    known = without_bad_labels(labels, num_classes, ignore_index, "class_feature_sums_backward")

    def sums(R: Tensor) -> Tensor:
        return reference.class_feature_sums(R, known, num_classes, align_corners)[0]

    return recompute_gradients(sums, [features], grad_sums)[0].contiguous()


def _sums_backward_fake(
    grad_sums: Tensor,
    labels: Tensor,
    height: int,
    width: int,
    ignore_index: int,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
    shape = (labels.shape[0], grad_sums.shape[1], height, width)
    return grad_sums.new_empty(shape, dtype=dtype)


SUMS_BACKWARD = Op(
    "class_feature_sums_backward",
    [cuda_kernel, cpu_kernel, Kernel("reference", _sums_backward_reference, always)],
    _sums_backward_fake,
)
SUMS_BACKWARD.refuse_gradient()


class ClassFeatureSums(torch.autograd.Function):
    """Linear in the features, so the gradient is the adjoint: A times the cotangent."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor,
        num_classes: int,
        ignore_index: int,
        align_corners: bool,
    ) -> tuple[Tensor, Tensor]:
        sums, counts = SUMS.below_autograd(
            features, labels, num_classes, ignore_index, align_corners
        )
        ctx.save_for_backward(labels)
        ctx.size, ctx.dtype = features.shape[-2:], features.dtype
        ctx.options = (ignore_index, align_corners)
        no_gradient_of(ctx, counts)
        return sums, counts

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor | None, _counts: None) -> tuple[Any, ...]:
        if grad_sums is None:
            return (None,) * 5
        (labels,) = ctx.saved_tensors
        grad = SUMS_BACKWARD(grad_sums, labels, *ctx.size, *ctx.options, ctx.dtype)
        return grad, None, None, None, None


def _sums_transformed(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    known = without_bad_labels(labels, num_classes, ignore_index, "class_feature_sums")
    return reference.class_feature_sums_by_index(features, known, num_classes, align_corners)


SUMS.differentiable(
    ClassFeatureSums.apply, lambda features, *_: features.requires_grad, _sums_transformed
)


# --- memory_update ------------------------------------------------------------------------------


def _update_reference(
    memory: Tensor,
    features: Tensor,
    labels: Tensor,
    momentum: float,
    unbiased: bool,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    known = without_bad_labels(labels, len(memory), ignore_index, "memory_update")
    sums, counts = reference.class_feature_sums(features, known, len(memory), align_corners)
    return reference.moving_average(memory, sums, counts, momentum, unbiased).contiguous()


def _update_fake(memory: Tensor, *_args: Any) -> Tensor:
    return torch.empty_like(memory, memory_format=torch.contiguous_format)


def _update_with_gradient(
    memory: Tensor,
    features: Tensor,
    labels: Tensor,
    momentum: float,
    unbiased: bool,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    """The same in two steps, of which the first has the gradient and the second is PyTorch."""
    sums, counts = SUMS(features, labels, memory.shape[0], ignore_index, align_corners)
    return reference.moving_average(memory, sums, counts, momentum, unbiased)


UPDATE = Op(
    "memory_update",
    [cuda_kernel, cpu_kernel, Kernel("reference", _update_reference, always, composite=True)],
    _update_fake,
    public=memory_update,
    prepare=_prepare_update,
)
UPDATE.differentiable(
    _update_with_gradient,
    lambda memory, features, *_: memory.requires_grad or features.requires_grad,
    _update_with_gradient,
)
