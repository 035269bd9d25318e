"""Accelerates segmentation_models_pytorch: all models whose segmentation head upsamples.

    model = segmentation_models_pytorch.DeepLabV3Plus("resnet34", classes=21)
    compat.smp.accelerate(model)

The model returns logits at the size of the image as before, but their values are computed only if
something needs them (:class:`mcibi_fast.compat.upsampled.Upsampled`): neither
``F.cross_entropy(model(x), labels)`` nor ``model(x).argmax(1)`` does. smp upsamples with
``align_corners=True``, which the stand-in records. Losses on probabilities or on ``log_softmax``
(``smp.losses.DiceLoss``, ``FocalLoss``, ``SoftCrossEntropyLoss``) compute the values, as before.

``with_mcibi`` gives such a model the dataset-level context of MCIBI++
(:mod:`mcibi_fast.compat.dataset_context`).
"""

from mcibi_fast.compat.dataset_context import context_of
from mcibi_fast.compat.smp.memory import from_pretrained, with_mcibi
from mcibi_fast.compat.smp.places import accelerate, explain, restore

__all__ = ["accelerate", "context_of", "explain", "from_pretrained", "restore", "with_mcibi"]
