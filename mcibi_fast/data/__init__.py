"""Datasets and transforms.

`Scenes` is built in; `FolderDataset` reads images and masks from a folder. Both give samples
{"image", "label", "name"}. `TrainTransform` and `EvalTransform` need torchvision, and nothing else
here does.
"""

from __future__ import annotations

from .base import IGNORE_INDEX, Sample, SegmentationDataset, Transform
from .check import Report, check
from .errors import DataError
from .folder import CAMVID_CLASSES, IMAGENET_MEAN, IMAGENET_STD, FolderDataset
from .scenes import SCENES_CLASSES, SCENES_PALETTE, Scenes
from .transforms import EvalTransform, TrainTransform

__all__ = [
    "CAMVID_CLASSES",
    "IGNORE_INDEX",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SCENES_CLASSES",
    "SCENES_PALETTE",
    "DataError",
    "EvalTransform",
    "FolderDataset",
    "Report",
    "Sample",
    "Scenes",
    "SegmentationDataset",
    "TrainTransform",
    "Transform",
    "check",
]
