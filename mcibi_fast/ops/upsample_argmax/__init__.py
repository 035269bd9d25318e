"""Argmax of bilinearly upsampled logits, and its confusion matrix, the upsampled logits not formed.

Between four neighbours of the low-resolution map every logit lies between its own smallest and
largest value there. A class whose largest stays below another's smallest cannot win at any of the
pixels in between: the kernels interpolate the few others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.ops import checks
from mcibi_fast.ops.compiled import cpu_kernel, cuda_kernel
from mcibi_fast.ops.dispatch import Kernel, Op, always
from mcibi_fast.ops.labels import without_bad_labels
from mcibi_fast.ops.upsample_argmax import reference


def upsample_argmax(
    logits: Tensor, size: tuple[int, int], *, align_corners: bool = False
) -> Tensor:
    """``F.interpolate(logits, size, mode="bilinear").argmax(1)``: the predicted label map.

    Has no gradient. Allocates the result; nothing of K times its size.

    Args:
        logits: (B, K, h, w), float32, float64, bfloat16 or float16, any strides. Interpolated in
            float32 (float64), under autocast too.
        size: (H, W), any.
        align_corners: of the bilinear upsampling, as in ``torch.nn.functional.interpolate``.

    Returns:
        (B, H, W) int64: the class of the largest interpolated logit, the first on ties. NaN is
        larger than any number, as in ``torch.argmax``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or dtype.
    """
    return ARGMAX(*_prepare_argmax(logits, size, align_corners))


def upsample_confusion(
    logits: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = False,
) -> Tensor:
    """Counts of (label, prediction) pairs over the pixels, the prediction by ``upsample_argmax``.

    Has no gradient. Allocates the result, and on the CPU another (K, K) per thread; neither the
    upsampled logits nor the predicted labels.

    Args:
        logits: (B, K, h, w), as in ``upsample_argmax``.
        labels: (B, H, W), any integer dtype and strides.
        num_classes: K, which must be that of the logits.
        ignore_index: the label of pixels that do not count. With more than 255 classes the default
            is an error: 255 is then a class.
        align_corners: of the bilinear upsampling.

    Returns:
        (K, K) int64; row: the label, column: the prediction.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or (at once
            on the CPU; on CUDA see ``check_labels``) a label is outside [0, K).
    """
    return CONFUSION(*_prepare_confusion(logits, labels, num_classes, ignore_index, align_corners))


def _prepare_argmax(logits: Tensor, size: tuple[int, int], align_corners: bool) -> tuple[Any, ...]:
    checks.logits(logits)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size: expected (H, W), got {size!r}")
    for length in size:
        checks.positive("size", length)
    return logits, *size, align_corners


def _prepare_confusion(
    logits: Tensor, labels: Tensor, num_classes: int, ignore_index: int, align_corners: bool
) -> tuple[Any, ...]:
    checks.logits_and_labels(logits, labels)
    checks.positive("num_classes", num_classes)
    if num_classes != logits.shape[1]:
        raise ValueError(
            f"num_classes: is {num_classes}, but the logits have {logits.shape[1]} classes"
        )
    checks.ignore_index(ignore_index, num_classes)
    return logits, labels, ignore_index, align_corners


ARGMAX = Op(
    "upsample_argmax",
    [cuda_kernel, cpu_kernel, Kernel("reference", reference.upsample_argmax, always)],
    lambda logits, height, width, align_corners: logits.new_empty(
        (logits.shape[0], height, width), dtype=torch.int64
    ),
    public=upsample_argmax,
    prepare=_prepare_argmax,
)


def _confusion_reference(
    logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    known = without_bad_labels(labels, logits.shape[1], ignore_index, "upsample_confusion")
    return reference.upsample_confusion(logits, known, align_corners)


CONFUSION = Op(
    "upsample_confusion",
    [cuda_kernel, cpu_kernel, Kernel("reference", _confusion_reference, always)],
    lambda logits, *_: logits.new_empty((logits.shape[1],) * 2, dtype=torch.int64),
    public=upsample_confusion,
    prepare=_prepare_confusion,
)
