"""Datasets and transforms.

`Scenes` is built in; `FolderDataset` reads images and masks from a folder; the published datasets
are read in their own layouts, unpacked or zipped (`DATASETS` has them by name); `pack` writes any
of them into tar shards, which `ShardedDataset` reads from a folder or a URL. All return samples
{"image", "label", "name"}. `MovingScenes` (built in), `VSPW` and `FolderVideos` are also videos:
`ClipDataset` returns their frames together with the frames before. Only `TrainTransform` and
`EvalTransform` need torchvision.
"""

from __future__ import annotations

from mcibi_fast.extras import require

require("mcibi_fast.data", "PIL", "tqdm")

from mcibi_fast.data.ade20k import ADE20K
from mcibi_fast.data.base import IGNORE_INDEX, Sample, SegmentationDataset, Transform
from mcibi_fast.data.check import check, check_named, check_shards, check_splits
from mcibi_fast.data.check_report import Report
from mcibi_fast.data.cityscapes import Cityscapes
from mcibi_fast.data.coco import CocoDataset
from mcibi_fast.data.coco_stuff import COCOStuff, COCOStuff171
from mcibi_fast.data.errors import DataError
from mcibi_fast.data.folder import CAMVID_CLASSES, FolderDataset
from mcibi_fast.data.folder_video import FolderVideos
from mcibi_fast.data.functions import FunctionTransform
from mcibi_fast.data.huggingface import HuggingFaceDataset
from mcibi_fast.data.lip import CIHP, LIP
from mcibi_fast.data.named import DATASETS, named, video_dataset
from mcibi_fast.data.packing import pack
from mcibi_fast.data.pascal_context import PascalContext, PascalContext60
from mcibi_fast.data.shards import ShardedDataset
from mcibi_fast.data.style import StyleMixing
from mcibi_fast.data.synthetic.moving_scenes import MovingScenes
from mcibi_fast.data.synthetic.scenes import SCENES_CLASSES, SCENES_PALETTE, Scenes
from mcibi_fast.data.transforms import EvalTransform, TrainTransform
from mcibi_fast.data.video import Clip, ClipDataset, Frame, VideoDataset
from mcibi_fast.data.voc import VOC
from mcibi_fast.data.vspw import VSPW
from mcibi_fast.defaults import IMAGENET_MEAN, IMAGENET_STD

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
    "CocoDataset",
    "DataError",
    "EvalTransform",
    "FolderDataset",
    "FolderVideos",
    "Frame",
    "FunctionTransform",
    "HuggingFaceDataset",
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
    "check_splits",
    "named",
    "pack",
    "video_dataset",
]
