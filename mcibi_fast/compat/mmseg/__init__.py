"""Accelerates the decode heads of mmsegmentation (its maintained fork: onedl-mmsegmentation).

    model = mmseg.registry.MODELS.build(config.model)
    compat.mmseg.accelerate(model)

``loss_by_feat`` and ``predict_by_feat`` of every head and auxiliary head run as mmsegmentation
wrote them, but never form the upsampled logits for its ``CrossEntropyLoss``, its accuracy and the
predicted labels. So the loss is mmsegmentation's: averaged over all pixels, the ignored ones
included, unless ``avg_non_ignore=True``; with ``class_weight``; labels (B, 1, H, W). OHEM and the
losses that read probabilities (Dice, Lovász, focal, Tversky, binary) still compute the values.

``with_mcibi`` gives such a model the dataset-level context of MCIBI++
(:mod:`mcibi_fast.compat.dataset_context`).
"""

from mcibi_fast.compat.dataset_context import context_of
from mcibi_fast.compat.mmseg.memory import with_mcibi
from mcibi_fast.compat.mmseg.places import accelerate, explain, restore

__all__ = ["accelerate", "context_of", "explain", "restore", "with_mcibi"]
