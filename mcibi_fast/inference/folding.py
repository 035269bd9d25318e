"""The form of a model in which inference is fastest with PyTorch alone."""

from __future__ import annotations

import copy

from mcibi_fast.models import Segmentor
from mcibi_fast.models.layout import to_channels_last
from mcibi_fast.nn.fold import fold_batch_norms


def folded(model: Segmentor) -> Segmentor:
    """A copy for inference, folded and in channels_last; its logits are equal up to rounding.

    See `Segmentor.fold`. Of a model without a memory, the batch norms are folded.

    Raises:
        ValueError: the memory has several representations per class.
    """
    if model.head.has_memory:
        made = model.fold()
    else:
        made = copy.deepcopy(model).eval().requires_grad_(False)
        fold_batch_norms(made)
    to_channels_last(made)
    return made


def folded_if_possible(model: Segmentor) -> Segmentor:
    """`folded`; the model itself if it cannot be folded, or takes W from the labels."""
    if model.needs_labels:
        return model
    try:
        return folded(model)
    except ValueError:
        return model
