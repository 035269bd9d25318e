"""Recipes: functions that return a `TrainConfig`, ready to train or to change field by field."""

from mcibi_fast.recipes.camvid import camvid
from mcibi_fast.recipes.config import (
    AugmentationConfig,
    FolderData,
    ModelConfig,
    OptimizerConfig,
    ScenesData,
    TrainConfig,
)
from mcibi_fast.recipes.demo import demo
from mcibi_fast.recipes.folder import folder
from mcibi_fast.recipes.scenes import scenes
from mcibi_fast.recipes.settings import apply_settings

__all__ = [
    "AugmentationConfig",
    "FolderData",
    "ModelConfig",
    "OptimizerConfig",
    "ScenesData",
    "TrainConfig",
    "apply_settings",
    "camvid",
    "demo",
    "folder",
    "scenes",
]
