"""Whole networks. Needs timm for the backbones."""

from __future__ import annotations

from mcibi_fast.models.backbones import create_backbone, set_drop_path
from mcibi_fast.models.deeplabv3 import deeplabv3, deeplabv3_mcibi, deeplabv3_mcibipp
from mcibi_fast.models.fcn import FCNHead, fcn, fcn_mcibi, fcn_mcibipp
from mcibi_fast.models.isnet import (
    ISNetHead,
    ISNetMCIBIHead,
    ISNetMCIBIPPHead,
    isnet,
    isnet_mcibi,
    isnet_mcibipp,
)
from mcibi_fast.models.mcibi import MCIBIHead
from mcibi_fast.models.mcibipp import MCIBIPPHead
from mcibi_fast.models.memory_head import MemoryHead
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.models.pspnet import pspnet, pspnet_mcibi, pspnet_mcibipp
from mcibi_fast.models.registry import create, names
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.models.upernet import (
    UperNetHead,
    UperNetMCIBIHead,
    UperNetMCIBIPPHead,
    upernet,
    upernet_mcibi,
    upernet_mcibipp,
)
from mcibi_fast.models.video import (
    UperNetVideoMCIBIHead,
    UperNetVideoMCIBIPPHead,
    VideoHead,
    VideoMCIBIHead,
    VideoMCIBIPPHead,
    VideoSegmentor,
    fcn_video_mcibi,
    fcn_video_mcibipp,
    load_image_weights,
    upernet_video_mcibi,
    upernet_video_mcibipp,
)
from mcibi_fast.nn.blocks import convert_sync_batchnorm

__all__ = [
    "FCNHead",
    "ISNetHead",
    "ISNetMCIBIHead",
    "ISNetMCIBIPPHead",
    "MCIBIHead",
    "MCIBIPPHead",
    "MemoryHead",
    "SegmentationOutput",
    "Segmentor",
    "UperNetHead",
    "UperNetMCIBIHead",
    "UperNetMCIBIPPHead",
    "UperNetVideoMCIBIHead",
    "UperNetVideoMCIBIPPHead",
    "VideoHead",
    "VideoMCIBIHead",
    "VideoMCIBIPPHead",
    "VideoSegmentor",
    "convert_sync_batchnorm",
    "create",
    "create_backbone",
    "deeplabv3",
    "deeplabv3_mcibi",
    "deeplabv3_mcibipp",
    "fcn",
    "fcn_mcibi",
    "fcn_mcibipp",
    "fcn_video_mcibi",
    "fcn_video_mcibipp",
    "isnet",
    "isnet_mcibi",
    "isnet_mcibipp",
    "load_image_weights",
    "names",
    "pspnet",
    "pspnet_mcibi",
    "pspnet_mcibipp",
    "set_drop_path",
    "upernet",
    "upernet_mcibi",
    "upernet_mcibipp",
    "upernet_video_mcibi",
    "upernet_video_mcibipp",
]
