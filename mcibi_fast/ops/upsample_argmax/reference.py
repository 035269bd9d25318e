"""Argmax of bilinearly upsampled logits, and the confusion matrix it makes: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mcibi_fast.ops.upsample_cross_entropy.reference import upsample


def upsample_argmax(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """The class of the largest upsampled logit, the first on ties; NaN is larger than any number.

    Args:
        logits: (B, K, h, w).
        height, width: H and W.
        align_corners: of the bilinear upsampling.

    Returns:
        (B, H, W) int64.
    """
    return upsample(logits, (height, width), align_corners).argmax(1)


def upsample_confusion(logits: Tensor, labels: Tensor, align_corners: bool) -> Tensor:
    """How many pixels of each class (rows) were predicted as which (columns).

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W) int64; -1 where ignored.
        align_corners: of the bilinear upsampling.

    Returns:
        (K, K) int64.
    """
    K = logits.shape[1]
    _, height, width = labels.shape
    prediction = upsample_argmax(logits, height, width, align_corners)
    valid = labels != -1
    return torch.bincount(labels[valid] * K + prediction[valid], minlength=K * K).view(K, K)
