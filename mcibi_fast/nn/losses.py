"""Training losses (section 3.4)."""

from __future__ import annotations

from torch import Tensor

from mcibi_fast import ops


def upsampled_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = 255, align_corners: bool = False
) -> Tensor:
    """Mean cross entropy over the valid pixels of bilinearly upsampled logits (Eqs. 14 and 15).

    ``ops.upsample_cross_entropy`` under the name of the modules here.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W), any integer dtype.
        ignore_index: label of the pixels that do not count; 0 is returned when all are such.
        align_corners: of the upsampling.

    Raises:
        TypeError, ValueError: arguments that do not fit, or on the CPU a label that is neither a
            class nor ``ignore_index``. On CUDA such a pixel does not count; see
            ``ops.check_labels``.
    """
    return ops.upsample_cross_entropy(
        logits, labels, ignore_index=ignore_index, align_corners=align_corners
    )


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
