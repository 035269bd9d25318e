"""Weights W that a head does not predict itself.

They belong to the next stage of iterative inference (section 3.5), or they are the ground truth.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mcibi_fast.nn.context import resize

Mixing = Literal["paper", "released"]


def mix_probabilities(
    weight_logits: Tensor, logits: Tensor, *, align_corners: bool = False
) -> Tensor:
    """The logarithm of W_{s+1} = (O_s + W) / 2, computed on probabilities (Eq. 17).

    The aggregation takes logits; the softmax of the logarithm is W_{s+1}.

    Args:
        weight_logits: logits of W from H_pr (B, K, h, w); always those of the first stage.
        logits: O_s (B, K, h', w'). The softmax is taken at this size, then resized to that of W.
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
        weight_logits: logits of the first stage's W (B, K, h, w).
        logits: O_s (B, K, h', w'), which is resized to the size of W.
        weights: (a, b).
    """
    a, b = weights
    O = resize(logits, weight_logits.shape[2:], align_corners)
    return (a * weight_logits + b * O) / (a + b - 1)


def mix(
    mixing: Mixing,
    weight_logits: Tensor,
    logits: Tensor,
    *,
    weights: tuple[float, float],
    align_corners: bool,
) -> Tensor:
    """Logits of the next stage's W (Eq. 17), by one of the two above.

    Args:
        mixing: "paper" (`mix_probabilities`) or "released" (`mix_logits`).
        weight_logits, logits, align_corners: see there.
        weights: of `mix_logits`.
    """
    if mixing == "paper":
        return mix_probabilities(weight_logits, logits, align_corners=align_corners)
    return mix_logits(weight_logits, logits, weights=weights, align_corners=align_corners)


def label_weights(labels: Tensor | None, weight_logits: Tensor, *, ignore_index: int) -> Tensor:
    """The ground truth as one-hot weights (B, K, h, w): GT-MCIBI++ of Table 1.

    Each feature pixel takes the label nearest to its centre; if that is ``ignore_index`` or no
    class, it takes the class that H_pr predicts.

    Args:
        labels: (B, H, W), any integer dtype.
        weight_logits: logits of W from H_pr (B, K, h, w).
        ignore_index: label that belongs to no class.

    Raises:
        ValueError: there are no labels.
    """
    if labels is None:
        raise ValueError(
            "labels: this model gathers with the ground truth (weights_from='labels') and needs "
            "labels in evaluation as well: model(images, labels)"
        )
    num_classes, size = weight_logits.shape[1], weight_logits.shape[2:]
    nearest = F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].long()
    known = (nearest >= 0) & (nearest < num_classes) & (nearest != ignore_index)
    target = torch.where(known, nearest, weight_logits.argmax(dim=1))
    classes = torch.arange(num_classes, device=labels.device)[:, None, None]
    return (target[:, None] == classes).to(weight_logits.dtype)
