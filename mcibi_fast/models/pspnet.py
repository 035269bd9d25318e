"""PSPNet: pyramid pooling as the context within the image, alone, with MCIBI++ and with MCIBI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mcibi_fast.models.backbones import Pretrained, create_backbone
from mcibi_fast.models.fcn import FCNHead
from mcibi_fast.models.mcibi import MCIBIHead
from mcibi_fast.models.mcibipp import MCIBIPPHead
from mcibi_fast.models.memory_head import MemoryHead
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.nn.decoder import Decoder
from mcibi_fast.nn.within_image import PPM


def pspnet(
    num_classes: int,
    backbone: str = "resnet50",
    *,
    output_stride: int = 8,
    pretrained: Pretrained = False,
    pool_scales: Sequence[int] = (1, 2, 3, 6),
    feats_channels: int = 512,
    dropout: float = 0.1,
    align_corners: bool = False,
    **head_options: Any,
) -> Segmentor:
    """The baseline: pyramid pooling of the last stage, then a classifier.

    Args:
        num_classes: K.
        backbone: any timm model with ``features_only``.
        output_stride: of the last stage.
        pretrained: load timm's weights, or those in this file.
        pool_scales: regions per side of the pyramid, one branch each.
        feats_channels: Z, channels of the context and of the pixel representations.
        dropout: channel dropout before each classifier.
        align_corners: of every bilinear resizing.
        head_options: more of :class:`FCNHead`'s.
    """
    features = create_backbone(backbone, output_stride=output_stride, pretrained=pretrained)
    last, Z = features.channels[-1], feats_channels
    context = PPM(last, Z, pool_scales=pool_scales, align_corners=align_corners)
    head = FCNHead(
        num_classes,
        features.channels,
        decoder=Decoder(last, Z, num_classes, dropout=dropout, conv=context),
        feats_channels=Z,
        dropout=dropout,
        align_corners=align_corners,
        **head_options,
    )
    return Segmentor(features, head)


def pspnet_mcibipp(
    num_classes: int,
    backbone: str = "resnet50",
    *,
    output_stride: int = 8,
    pretrained: Pretrained = False,
    head_type: type[MemoryHead] = MCIBIPPHead,
    pool_scales: Sequence[int] = (1, 2, 3, 6),
    feats_channels: int = 512,
    align_corners: bool = False,
    **head_options: Any,
) -> Segmentor:
    """PSPNet with MCIBI++: the pyramid is C_wi (Eq. 3).

    Args:
        num_classes: K.
        backbone: any timm model with ``features_only``.
        output_stride: of the last stage.
        pretrained: load timm's weights, or those in this file.
        head_type: the head with a memory.
        pool_scales: regions per side of the pyramid, one branch each.
        feats_channels: Z, channels of the context and of the pixel representations.
        align_corners: of every bilinear resizing.
        head_options: more of :class:`MCIBIPPHead`'s.
    """
    features = create_backbone(backbone, output_stride=output_stride, pretrained=pretrained)
    last, Z = features.channels[-1], feats_channels
    head = head_type(
        num_classes,
        features.channels,
        within_image=PPM(last, Z, pool_scales=pool_scales, align_corners=align_corners),
        feats_channels=Z,
        align_corners=align_corners,
        **head_options,
    )
    return Segmentor(features, head)


def pspnet_mcibi(num_classes: int, backbone: str = "resnet50", **options: Any) -> Segmentor:
    """PSPNet with MCIBI, arguments as for :func:`pspnet_mcibipp`; see :class:`MCIBIHead`."""
    return pspnet_mcibipp(num_classes, backbone, head_type=MCIBIHead, **options)
