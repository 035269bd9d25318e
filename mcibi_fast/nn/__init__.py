"""Modules to build a segmentation network from; they import neither timm nor torchvision.

The docstrings use the paper's symbols. For an image of h x w feature pixels and K classes:

- R (B, Z, h, w): the pixel representations, that is, the network's features.
- C_dl (K, Z): one dataset-level representation per class, drawn from the memory.
- W (B, K, h, w): for each pixel, the weights with which it mixes the classes. H_pr predicts its
  logits; the softmax over the classes makes each pixel's weights sum to one.
- C~_bi (B, Z, h, w): W times C_dl, a mixture of class representations for each pixel.
- C_bi (B, Z, h, w): the context from beyond the image: attention with queries R and keys C~_bi.
  T is the width of this attention, P its weights between pixels.
- R_aug: F_T(R, C_bi), the representations augmented with that context.
- H_cls: the head that predicts the classes from R_aug; its logits are called O.
"""

from mcibi_fast.nn.attention import PositionConfidenceAttention, SeveralAttentions
from mcibi_fast.nn.blocks import conv_bn_relu, convert_sync_batchnorm
from mcibi_fast.nn.context import DatasetLevelContext, DatasetLevelOutput
from mcibi_fast.nn.decoder import Decoder
from mcibi_fast.nn.diagonal_memory import DiagonalMemory
from mcibi_fast.nn.learnt_memory import LearntMemory
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
from mcibi_fast.ops.scripting import refuse_scripting

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
    "DiagonalMemory",
    "GaussianMemory",
    "ISNetContext",
    "LearntMemory",
    "PixelLoss",
    "PositionConfidenceAttention",
    "RepresentationMemory",
    "SeveralAttentions",
    "conv_bn_relu",
    "convert_sync_batchnorm",
    "joint_losses",
]

refuse_scripting(*(item for name in __all__ if isinstance(item := globals()[name], type)))
