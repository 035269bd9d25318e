"""Datasets and transforms.

`Scenes` is built in; `FolderDataset` reads images and masks from a folder; the published datasets
are read in their own layouts, unpacked or zipped (`DATASETS` has them by name); `pack` writes any
of them into tar shards, which `ShardedDataset` reads from a folder or a URL. All give samples
{"image", "label", "name"}. `MovingScenes` (built in), `VSPW` and `FolderVideos` are videos, too:
`ClipDataset` gives their frames with the frames before. `TrainTransform` and `EvalTransform` need
torchvision, and nothing else here does.
"""

from __future__ import annotations

from .ade20k import ADE20K
from .base import IGNORE_INDEX, Sample, SegmentationDataset, Transform
from .check import Report, check, check_named, check_shards
from .cityscapes import Cityscapes
from .coco_stuff import COCOStuff, COCOStuff171
from .errors import DataError
from .folder import CAMVID_CLASSES, IMAGENET_MEAN, IMAGENET_STD, FolderDataset
from .folder_video import FolderVideos
from .lip import CIHP, LIP
from .moving_scenes import MovingScenes
from .named import DATASETS, named, video_dataset
from .packing import pack
from .pascal_context import PascalContext, PascalContext60
from .scenes import SCENES_CLASSES, SCENES_PALETTE, Scenes
from .shards import ShardedDataset
from .style import StyleMixing
from .transforms import EvalTransform, TrainTransform
from .video import Clip, ClipDataset, Frame, VideoDataset
from .voc import VOC
from .vspw import VSPW

__all__ = [
    "ADE20K",
    "CAMVID_CLASSES",
    "CIHP",
    "DATASETS",
    "IGNORE_INDEX",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "LIP",
    "SCENES_CLASSES",
    "SCENES_PALETTE",
    "VOC",
    "VSPW",
    "COCOStuff",
    "COCOStuff171",
    "Cityscapes",
    "Clip",
    "ClipDataset",
    "DataError",
    "EvalTransform",
    "FolderDataset",
    "FolderVideos",
    "Frame",
    "MovingScenes",
    "PascalContext",
    "PascalContext60",
    "Report",
    "Sample",
    "Scenes",
    "SegmentationDataset",
    "ShardedDataset",
    "StyleMixing",
    "TrainTransform",
    "Transform",
    "VideoDataset",
    "check",
    "check_named",
    "check_shards",
    "named",
    "pack",
    "video_dataset",
]
