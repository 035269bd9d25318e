"""What every model returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SegmentationOutput(NamedTuple):
    """Results of a forward pass.

    Attributes:
        logits: O before the upsampling (B, K, h, w).
        losses: the weighted terms, empty without labels; the training loss is their sum.
        weight_logits: logits of W from H_pr (Eq. 10); None for a model without a memory.
        context_logits: logits of the head on the within-image context; None without such a head.
    """

    logits: Tensor
    losses: dict[str, Tensor]
    weight_logits: Tensor | None = None
    context_logits: Tensor | None = None
