"""Coarse-to-fine iterative inference (section 3.5): the weights of the next stage."""

from __future__ import annotations

from torch import Tensor

from mcibi_fast.nn.context import resize


def mix_probabilities(
    weight_logits: Tensor, logits: Tensor, *, align_corners: bool = False
) -> Tensor:
    """W_{s+1} = (O_s + W) / 2 on probabilities (Eq. 17), as its logarithm.

    The logarithm, of which a softmax gives W_{s+1} back, is what the aggregation takes.

    Args:
        weight_logits: H_pr's (B, K, h, w); always those of the first stage.
        logits: O_s (B, K, h', w'); softmaxed at its own stride, then resized to W's.
    """
    O = resize(logits.softmax(dim=1), weight_logits.shape[2:], align_corners)
    return ((O + weight_logits.softmax(dim=1)) / 2).log()


def mix_logits(
    weight_logits: Tensor,
    logits: Tensor,
    *,
    weights: tuple[float, float] = (2.0, 1.5),
    align_corners: bool = False,
) -> Tensor:
    """(a W + b O_s) / (a + b - 1) on logits: the released code's form of Eq. 17.

    Args:
        weight_logits: of the first stage (B, K, h, w).
        logits: O_s (B, K, h', w'), resized to the size of W.
        weights: (a, b).
    """
    a, b = weights
    O = resize(logits, weight_logits.shape[2:], align_corners)
    return (a * weight_logits + b * O) / (a + b - 1)
