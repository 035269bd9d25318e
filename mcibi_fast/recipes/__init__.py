"""Recipes: functions that return a `TrainConfig`, ready to train or to change field by field."""

from mcibi_fast.recipes.camvid import camvid, camvid_lite
from mcibi_fast.recipes.config import ModelConfig, TrainConfig
from mcibi_fast.recipes.demo import demo
from mcibi_fast.recipes.folder import coco, folder, huggingface
from mcibi_fast.recipes.parts import (
    AdversarialConfig,
    AugmentationConfig,
    InferenceConfig,
    LossConfig,
    OptimizerConfig,
    SpeedConfig,
)
from mcibi_fast.recipes.published import (
    ade20k,
    cihp,
    cityscapes,
    cityscapes_trainval,
    coco_stuff,
    lip,
    pascal_context,
    voc,
)
from mcibi_fast.recipes.scenes import scenes
from mcibi_fast.recipes.settings import apply_settings, apply_table
from mcibi_fast.recipes.sources import (
    CocoData,
    FolderData,
    HuggingFaceData,
    MovingScenesData,
    NamedData,
    ScenesData,
    ShardsData,
    VideoData,
)
from mcibi_fast.recipes.stopping import StoppingConfig
from mcibi_fast.recipes.video import camvid_video, moving_scenes, vspw

__all__ = [
    "AdversarialConfig",
    "AugmentationConfig",
    "CocoData",
    "FolderData",
    "HuggingFaceData",
    "InferenceConfig",
    "LossConfig",
    "ModelConfig",
    "MovingScenesData",
    "NamedData",
    "OptimizerConfig",
    "ScenesData",
    "ShardsData",
    "SpeedConfig",
    "StoppingConfig",
    "TrainConfig",
    "VideoData",
    "ade20k",
    "apply_settings",
    "apply_table",
    "camvid",
    "camvid_lite",
    "camvid_video",
    "cihp",
    "cityscapes",
    "cityscapes_trainval",
    "coco",
    "coco_stuff",
    "demo",
    "folder",
    "huggingface",
    "lip",
    "moving_scenes",
    "pascal_context",
    "scenes",
    "voc",
    "vspw",
]
