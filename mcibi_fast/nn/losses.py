"""Training losses (section 3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def upsampled_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = 255, align_corners: bool = False
) -> Tensor:
    """Mean cross entropy over the valid pixels of bilinearly upsampled logits (Eqs. 14 and 15).

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W), any integer dtype.
        ignore_index: label of the pixels that do not count; 0 is returned when all are such.

    Raises:
        ValueError: shapes that do not fit, or on the CPU a label that is neither a class nor
            ``ignore_index``. On CUDA such a pixel does not count.
    """
    if logits.ndim != 4 or labels.ndim != 3 or len(logits) != len(labels):
        raise ValueError(
            "expected logits (B, K, h, w) and labels (B, H, W) of one batch, got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    labels = _valid_labels(labels.long(), logits.shape[1], ignore_index)
    # 16-bit logits are summed over thousands of pixels here.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    upsampled = F.interpolate(
        logits, labels.shape[1:], mode="bilinear", align_corners=align_corners
    )
    total = F.cross_entropy(upsampled, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def joint_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    weight_logits: Tensor | None = None,
    context_logits: Tensor | None = None,
    auxiliary_logits: Tensor | None = None,
    alpha: float = 0.4,
    auxiliary_weight: float = 0.4,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> dict[str, Tensor]:
    """The weighted terms whose sum is the training loss: L = alpha L_W + L_O (Eq. 16) and more.

    Args:
        logits: of H_cls; ``loss_cls``, weight 1 (L_O).
        labels: (B, H, W).
        weight_logits: of H_pr; ``loss_pr``, weight ``alpha`` (L_W).
        context_logits: of the head on the within-image context; ``loss_cwi``, weight 1.
        auxiliary_logits: of the head on an earlier stage; ``loss_aux``, weight
            ``auxiliary_weight``.
        ignore_index, align_corners: see :func:`upsampled_cross_entropy`.
    """
    terms = {
        "loss_cls": (1.0, logits),
        "loss_pr": (alpha, weight_logits),
        "loss_cwi": (1.0, context_logits),
        "loss_aux": (auxiliary_weight, auxiliary_logits),
    }
    return {
        name: weight
        * upsampled_cross_entropy(
            term, labels, ignore_index=ignore_index, align_corners=align_corners
        )
        for name, (weight, term) in terms.items()
        if term is not None
    }


def _valid_labels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """The labels with everything that is no class ignored; raises where the wait costs nothing."""
    outside = (labels < 0) | (labels >= num_classes)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = outside & (labels != ignore_index)
        if bad.any():
            b, y, x = bad.nonzero()[0].tolist()
            raise ValueError(
                f"labels: value {int(labels[b, y, x])} at (b={b}, y={y}, x={x}) is outside "
                f"[0, {num_classes}) and is not ignore_index ({ignore_index})"
            )
    return labels.masked_fill(outside, ignore_index)
