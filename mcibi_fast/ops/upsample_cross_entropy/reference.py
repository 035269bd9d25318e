"""Cross entropy of bilinearly upsampled logits (Eqs. 14 and 15): the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """U logits, (B, K, H, W) in float32 (float64 for float64 logits)."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return F.interpolate(logits.to(wide), size, mode="bilinear", align_corners=align_corners)


def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of every pixel, and the log-sum-exp of its upsampled logits.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W) int64; -1 where ignored.
        weight: w, (K,), or None for ones.
        label_smoothing: s, the share of the target that is spread over all classes.
        align_corners: of the bilinear upsampling.

    Returns:
        losses and lse, (B, H, W); both are 0 at ignored pixels.
    """
    _, height, width = labels.shape
    upsampled = upsample(logits, (height, width), align_corners)
    losses = F.cross_entropy(
        upsampled,
        labels,
        weight=weight,
        ignore_index=-1,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return losses, upsampled.logsumexp(1).masked_fill(labels == -1, 0.0)
