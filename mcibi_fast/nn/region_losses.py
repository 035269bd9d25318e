"""Dice, Lovász and focal losses, of segmentation_models_pytorch, on upsampled logits.

Unlike the cross entropy they are no sum of linear functions of the logits and their log-sum-exp at
each pixel, so they cannot be computed at the network's stride: the logits (B, K, H, W) are formed
at the labels' size, and so are the probabilities and what each loss makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.extras import load
from mcibi_fast.nn.context import resize

NAMES = ("dice", "lovasz", "focal")


def region_losses(
    logits: Tensor,
    labels: Tensor,
    weights: Mapping[str, float],
    *,
    focal_gamma: float = 2.0,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = False,
) -> dict[str, Tensor]:
    """The weighted losses ``loss_dice``, ``loss_lovasz`` and ``loss_focal`` (those with a weight).

    * dice: 1 - 2 |A and B| / (|A| + |B|) with probabilities for A, over all pixels of the batch;
      its mean over the K classes, of which those without a pixel in the batch count as 0.
    * lovasz: the Lovász-Softmax (arXiv 1705.08790) over all pixels of the batch, its mean over the
      classes that occur; of one logit the Lovász hinge.
    * focal: (1 - p)^gamma times the binary cross entropy of each class against the rest (arXiv
      1708.02002), its mean over pixels and classes.

    Labels equal to ``ignore_index`` do not count; without any others each loss is 0. Several
    processes each take their own pixels. The library selects valid pixels by a mask, so a GPU's
    host waits in each step.

    Args:
        logits: (B, K, h, w) at the network's stride, or one logit (B, 1, h, w), whose labels are 0
            and 1. They are resized to the labels' size (bilinear) in float32, which the library
            needs.
        labels: (B, H, W), any integer dtype.
        weights: of the losses by `NAMES`; 0 leaves one out.
        focal_gamma: gamma.
        ignore_index: label that does not count.
        align_corners: whether the resizing aligns corners.

    Raises:
        MissingExtra: segmentation_models_pytorch is missing.
    """
    wanted = {name: weight for name, weight in weights.items() if weight}
    if not wanted:
        return {}
    library: Any = load("Dice, Lovász and focal losses", "segmentation_models_pytorch.losses")
    mode = "binary" if logits.shape[1] == 1 else "multiclass"
    made: dict[str, Callable[[], Any]] = {
        "dice": partial(library.DiceLoss, mode, ignore_index=ignore_index),
        "lovasz": partial(library.LovaszLoss, mode, ignore_index=ignore_index),
        "focal": partial(library.FocalLoss, mode, gamma=focal_gamma, ignore_index=ignore_index),
    }
    with torch.autocast(logits.device.type, enabled=False):
        full = resize(logits.float(), labels.shape[1:], align_corners)
        labels = labels.long()
        if not bool((labels != ignore_index).any()):  # the library gives NaN or no scalar then
            nothing = full.sum() * 0.0
            return {f"loss_{name}": nothing for name in wanted}
        given = full[:, 0] if mode == "binary" else full
        losses = {}
        for name, weight in wanted.items():
            losses[f"loss_{name}"] = weight * made[name]()(
                full if name == "dice" else given, labels
            )
        return losses
