"""Loads checkpoints of the authors' released code (sssegmentation) and accelerates its models.

``with_mcibi`` gives its other segmentors the dataset-level context of MCIBI++.

    model = compat.sssegmentation.load("mcibiplusplus_resnet50os8_ade20k.pth")
    compat.sssegmentation.accelerate(model_of_the_released_package)
"""

from mcibi_fast.compat.accelerate import accelerate, explain, restore
from mcibi_fast.compat.dataset_context import context_of
from mcibi_fast.compat.names import released_name
from mcibi_fast.compat.sssegmentation.loading import Loaded, head, load, load_published
from mcibi_fast.compat.sssegmentation.memory import with_mcibi
from mcibi_fast.compat.sssegmentation.source import followed

__all__ = [
    "Loaded",
    "accelerate",
    "context_of",
    "explain",
    "followed",
    "head",
    "load",
    "load_published",
    "released_name",
    "restore",
    "with_mcibi",
]
