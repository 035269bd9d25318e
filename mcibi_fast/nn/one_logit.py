"""Two classes told apart by one logit: K = 1, the sigmoid.

The logit z of the foreground (class 1) against the background (class 0) is the pair of logits
(0, z): its softmax is (1 - sigmoid(z), sigmoid(z)), its cross entropy is the binary one, its argmax
is z > 0, and bilinear resizing keeps the 0. So everything that takes logits of two classes takes
one logit without further code, and at the network's stride.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def two_logits(logits: Tensor) -> Tensor:
    """(B, 1, h, w) -> (0, z), (B, 2, h, w); logits of more classes are returned as they are."""
    return F.pad(logits, (0, 0, 0, 0, 1, 0)) if logits.shape[1] == 1 else logits


def classes_of_memory(num_classes: int) -> int:
    """Classes of the memory of a model of K classes: with one logit both have a place in it."""
    return max(num_classes, 2)


def threshold_shift(threshold: float) -> float:
    """What is added to the second class's logit, so that it wins where its probability > t."""
    return math.log((1 - threshold) / threshold)
