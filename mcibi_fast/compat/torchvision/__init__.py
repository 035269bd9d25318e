"""Accelerates torchvision's segmentation models: FCN, DeepLabV3 and LR-ASPP.

    model = torchvision.models.segmentation.deeplabv3_resnet50(num_classes=21)
    compat.torchvision.accelerate(model)

The model returns ``"out"`` and ``"aux"`` at the size of the image as before, but their values are
computed only if something needs them (:class:`mcibi_fast.compat.upsampled.Upsampled`): neither
``F.cross_entropy(model(x)["out"], labels)`` nor ``model(x)["out"].argmax(1)`` does.

``with_mcibi`` gives such a model the dataset-level context of MCIBI++
(:mod:`mcibi_fast.compat.dataset_context`).
"""

from mcibi_fast.compat.dataset_context import context_of
from mcibi_fast.compat.torchvision.memory import with_mcibi
from mcibi_fast.compat.torchvision.places import accelerate, explain, restore

__all__ = ["accelerate", "context_of", "explain", "restore", "with_mcibi"]
