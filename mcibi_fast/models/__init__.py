"""Whole networks: a backbone and a head.

:func:`create` builds a model from a framework (one class in one file), an optional memory and, for
videos, a number of past frames. Needs the extra ``models``: timm for the backbones, safetensors and
huggingface_hub for weights.
"""

from __future__ import annotations

from functools import partial

from mcibi_fast.extras import require

require("mcibi_fast.models", "timm", "safetensors", "huggingface_hub")

from mcibi_fast.models import registry
from mcibi_fast.models.backbones import create_backbone, set_drop_path
from mcibi_fast.models.deeplabv3 import DeepLabV3
from mcibi_fast.models.fcn import FCN
from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.isnet import ISNet
from mcibi_fast.models.mcibi import MCIBIHead
from mcibi_fast.models.mcibipp import MCIBIPPHead
from mcibi_fast.models.memory_head import MemoryHead
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.models.plain_head import PlainHead
from mcibi_fast.models.pspnet import PSPNet
from mcibi_fast.models.registry import (
    create,
    framework,
    frameworks,
    head_type,
    memories,
    names,
    normalisation,
)
from mcibi_fast.models.segmentor import Segmentor, SegmentorWrapper
from mcibi_fast.models.upernet import UperNet
from mcibi_fast.models.video import VideoHead, VideoSegmentor, load_image_weights
from mcibi_fast.nn.blocks import convert_sync_batchnorm

__all__ = [
    "FCN",
    "DeepLabV3",
    "ISNet",
    "MCIBIHead",
    "MCIBIPPHead",
    "MemoryHead",
    "PSPNet",
    "PlainHead",
    "SegmentationHead",
    "SegmentationOutput",
    "Segmentor",
    "SegmentorWrapper",
    "UperNet",
    "VideoHead",
    "VideoSegmentor",
    "convert_sync_batchnorm",
    "create",
    "create_backbone",
    "framework",
    "frameworks",
    "head_type",
    "load_image_weights",
    "memories",
    "names",
    "normalisation",
    "set_drop_path",
]

# A function for each combination's one-word name: models.upernet_mcibipp(num_classes, ...) is
# create("upernet_mcibipp", num_classes, ...).
globals().update({name: partial(create, name) for name in names()})


def __getattr__(name: str) -> type[SegmentationHead]:
    """The head class of a combination by its name.

    ``models.UperNetMCIBIPPHead`` is ``head_type("upernet", "mcibipp")``.
    """
    return getattr(registry, name)
