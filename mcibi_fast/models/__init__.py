"""Whole networks: a backbone and a head.

:func:`create` builds a model from a framework (one class in one file), an optional memory and, for
videos, a number of past frames. Needs the extra ``models``: timm for the backbones, safetensors and
huggingface_hub for weights.
"""

from __future__ import annotations

from functools import partial

from mcibi_fast.extras import require

require("mcibi_fast.models", "timm", "safetensors", "huggingface_hub")

from mcibi_fast.models import hub, registry
from mcibi_fast.models.annnet import ANNNet
from mcibi_fast.models.apcnet import APCNet
from mcibi_fast.models.backbones import create_backbone, set_drop_path
from mcibi_fast.models.ccnet import CCNet
from mcibi_fast.models.ce2p import CE2P
from mcibi_fast.models.creation import create, normalisation
from mcibi_fast.models.danet import DANet
from mcibi_fast.models.deeplabv3 import DeepLabV3
from mcibi_fast.models.deeplabv3plus import DeepLabV3Plus
from mcibi_fast.models.dmnet import DMNet
from mcibi_fast.models.dnlnet import DNLNet
from mcibi_fast.models.emanet import EMANet
from mcibi_fast.models.encnet import EncNet
from mcibi_fast.models.etc import ETC
from mcibi_fast.models.fcn import FCN
from mcibi_fast.models.fine_tuning import Beginning, begin_with
from mcibi_fast.models.gcnet import GCNet
from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.isanet import ISANet
from mcibi_fast.models.isnet import ISNet
from mcibi_fast.models.maskformer import MaskFormer
from mcibi_fast.models.mcibi import MCIBIHead
from mcibi_fast.models.mcibipp import MCIBIPPHead
from mcibi_fast.models.memory_head import MemoryHead
from mcibi_fast.models.netwarp import NetWarp
from mcibi_fast.models.nonlocalnet import NonLocalNet
from mcibi_fast.models.ocrnet import OCRNet
from mcibi_fast.models.output import DictOutput, SegmentationOutput
from mcibi_fast.models.plain_head import PlainHead
from mcibi_fast.models.pointrend import PointRend
from mcibi_fast.models.psanet import PSANet
from mcibi_fast.models.pspnet import PSPNet
from mcibi_fast.models.registry import (
    framework,
    frameworks,
    head_type,
    memories,
    names,
    video_method,
    video_methods,
)
from mcibi_fast.models.segmentor import Segmentor, SegmentorWrapper
from mcibi_fast.models.semanticfpn import SemanticFPN
from mcibi_fast.models.setr import SETR
from mcibi_fast.models.tcb import TCB
from mcibi_fast.models.upernet import UperNet
from mcibi_fast.models.video import VideoHead, VideoMethod, VideoSegmentor, load_image_weights
from mcibi_fast.nn.blocks import convert_sync_batchnorm

__all__ = [
    "CE2P",
    "ETC",
    "FCN",
    "SETR",
    "TCB",
    "ANNNet",
    "APCNet",
    "Beginning",
    "CCNet",
    "DANet",
    "DMNet",
    "DNLNet",
    "DeepLabV3",
    "DeepLabV3Plus",
    "DictOutput",
    "EMANet",
    "EncNet",
    "GCNet",
    "ISANet",
    "ISNet",
    "MCIBIHead",
    "MCIBIPPHead",
    "MaskFormer",
    "MemoryHead",
    "NetWarp",
    "NonLocalNet",
    "OCRNet",
    "PSANet",
    "PSPNet",
    "PlainHead",
    "PointRend",
    "SegmentationHead",
    "SegmentationOutput",
    "Segmentor",
    "SegmentorWrapper",
    "SemanticFPN",
    "UperNet",
    "VideoHead",
    "VideoMethod",
    "VideoSegmentor",
    "begin_with",
    "convert_sync_batchnorm",
    "create",
    "create_backbone",
    "framework",
    "frameworks",
    "head_type",
    "hub",
    "load_image_weights",
    "memories",
    "names",
    "normalisation",
    "set_drop_path",
    "video_method",
    "video_methods",
]

# A function for each combination's one-word name: models.upernet_mcibipp(num_classes, ...) is
# create("upernet_mcibipp", num_classes, ...).
globals().update({name: partial(create, name) for name in names()})


def __getattr__(name: str) -> type[SegmentationHead]:
    """The head class of a combination by its name.

    ``models.UperNetMCIBIPPHead`` is ``head_type("upernet", "mcibipp")``.
    """
    return getattr(registry, name)
