"""Recipes: functions that return a `TrainConfig`, ready to train or to change field by field."""

from mcibi_fast.recipes.camvid import camvid
from mcibi_fast.recipes.config import ModelConfig, TrainConfig
from mcibi_fast.recipes.demo import demo
from mcibi_fast.recipes.folder import folder
from mcibi_fast.recipes.parts import (
    AdversarialConfig,
    AugmentationConfig,
    InferenceConfig,
    LossConfig,
    OptimizerConfig,
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
from mcibi_fast.recipes.settings import apply_settings
from mcibi_fast.recipes.sources import (
    FolderData,
    MovingScenesData,
    NamedData,
    ScenesData,
    ShardsData,
    VideoData,
)
from mcibi_fast.recipes.video import camvid_video, moving_scenes, vspw

__all__ = [
    "AdversarialConfig",
    "AugmentationConfig",
    "FolderData",
    "InferenceConfig",
    "LossConfig",
    "ModelConfig",
    "MovingScenesData",
    "NamedData",
    "OptimizerConfig",
    "ScenesData",
    "ShardsData",
    "TrainConfig",
    "VideoData",
    "ade20k",
    "apply_settings",
    "camvid",
    "camvid_video",
    "cihp",
    "cityscapes",
    "cityscapes_trainval",
    "coco_stuff",
    "demo",
    "folder",
    "lip",
    "moving_scenes",
    "pascal_context",
    "scenes",
    "voc",
    "vspw",
]
