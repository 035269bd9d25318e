"""Modules to build a segmentation network from; they import neither timm nor torchvision."""

from mcibi_fast.nn.attention import PositionConfidenceAttention, SeveralAttentions
from mcibi_fast.nn.blocks import conv_bn_relu, convert_sync_batchnorm
from mcibi_fast.nn.context import DatasetLevelContext, DatasetLevelOutput
from mcibi_fast.nn.decoder import Decoder
from mcibi_fast.nn.losses import PixelLoss, joint_losses
from mcibi_fast.nn.memory import GaussianMemory
from mcibi_fast.nn.representation_memory import RepresentationMemory
from mcibi_fast.nn.within_image import (
    ANN,
    ASPP,
    DNL,
    PPM,
    APCNet,
    CCNet,
    DANet,
    ISNetContext,
)

__all__ = [
    "ANN",
    "ASPP",
    "DNL",
    "PPM",
    "APCNet",
    "CCNet",
    "DANet",
    "DatasetLevelContext",
    "DatasetLevelOutput",
    "Decoder",
    "GaussianMemory",
    "ISNetContext",
    "PixelLoss",
    "PositionConfidenceAttention",
    "RepresentationMemory",
    "SeveralAttentions",
    "conv_bn_relu",
    "convert_sync_batchnorm",
    "joint_losses",
]
