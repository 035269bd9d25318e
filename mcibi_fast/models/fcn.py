"""FCN, alone, with MCIBI++ (the first two rows of Table 1) and with MCIBI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mcibi_fast.models.backbones import Pretrained, create_backbone
from mcibi_fast.models.mcibi import MCIBIHead
from mcibi_fast.models.mcibipp import MCIBIPPHead
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.nn.decoder import Decoder
from mcibi_fast.nn.losses import PixelLoss, joint_losses


def fcn(
    num_classes: int,
    backbone: str = "resnet50",
    *,
    output_stride: int = 8,
    pretrained: Pretrained = False,
    **head_options: Any,
) -> Segmentor:
    """The baseline: Conv3x3-BN-ReLU on the last stage, then a classifier.

    Args:
        num_classes: K.
        backbone: any timm model with ``features_only``.
        output_stride: of the last stage.
        pretrained: load timm's weights, or those in this file.
        head_options: see :class:`FCNHead`.
    """
    features = create_backbone(backbone, output_stride=output_stride, pretrained=pretrained)
    return Segmentor(features, FCNHead(num_classes, features.channels, **head_options))


def fcn_mcibipp(
    num_classes: int,
    backbone: str = "resnet50",
    *,
    output_stride: int = 8,
    pretrained: Pretrained = False,
    **head_options: Any,
) -> Segmentor:
    """FCN with MCIBI++: no within-image context, the dataset-level one between R and classifier.

    Args:
        num_classes: K.
        backbone: any timm model with ``features_only``.
        output_stride: of the last stage.
        pretrained: load timm's weights, or those in this file.
        head_options: see :class:`MCIBIPPHead`.
    """
    features = create_backbone(backbone, output_stride=output_stride, pretrained=pretrained)
    return Segmentor(features, MCIBIPPHead(num_classes, features.channels, **head_options))


def fcn_mcibi(
    num_classes: int,
    backbone: str = "resnet50",
    *,
    output_stride: int = 8,
    pretrained: Pretrained = False,
    **head_options: Any,
) -> Segmentor:
    """FCN with MCIBI, the conference version: Memory-R of Table 3.

    Args:
        num_classes: K.
        backbone: any timm model with ``features_only``.
        output_stride: of the last stage.
        pretrained: load timm's weights, or those in this file.
        head_options: see :class:`MCIBIHead`.
    """
    features = create_backbone(backbone, output_stride=output_stride, pretrained=pretrained)
    return Segmentor(features, MCIBIHead(num_classes, features.channels, **head_options))


class FCNHead(nn.Module):
    """Classifies the last stage's features, with an auxiliary head on the stage before.

    The heads of the other frameworks without MCIBI++ are this one with a decoder of their own.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        decoder: what classifies ``decoder_input``; Conv3x3-BN-ReLU and a classifier by default.
        feats_channels: Z, channels of the pixel representations.
        dropout: channel dropout before each classifier.
        auxiliary_weight: of the auxiliary head's loss; 0 leaves the head out.
        ignore_index: label that does not count in the losses.
        align_corners: of every bilinear resizing.
        loss: of every term; the plain mean cross entropy by default.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        decoder: Decoder | None = None,
        feats_channels: int = 512,
        dropout: float = 0.1,
        auxiliary_weight: float = 0.4,
        ignore_index: int = 255,
        align_corners: bool = False,
        loss: PixelLoss | None = None,
    ) -> None:
        super().__init__()
        Z = feats_channels
        self.decoder = decoder or Decoder(
            in_channels[-1], Z, num_classes, kernel_size=3, dropout=dropout
        )
        self.auxiliary = (
            Decoder(in_channels[-2], Z, num_classes, kernel_size=3, dropout=dropout)
            if auxiliary_weight
            else None
        )
        self.auxiliary_weight = auxiliary_weight
        self.ignore_index = ignore_index
        self.align_corners = align_corners
        self.loss = loss or PixelLoss()

    def pixel_representations(self, features: Sequence[Tensor]) -> Tensor:
        """R (B, Z, h, w), what is classified."""
        return self.decoder.conv(self.decoder_input(features))

    def decoder_input(self, features: Sequence[Tensor]) -> Tensor:
        """What the decoder takes of the backbone's maps."""
        return features[-1]

    def forward(
        self, features: Sequence[Tensor], labels: Tensor | None = None
    ) -> SegmentationOutput:
        logits = self.decoder(self.decoder_input(features))
        losses = {} if labels is None else self.losses(features, logits, labels)
        return SegmentationOutput(logits, losses)

    def losses(
        self, features: Sequence[Tensor], logits: Tensor, labels: Tensor, **terms: Any
    ) -> dict[str, Tensor]:
        """The weighted terms, further ones as :func:`joint_losses` takes them."""
        return joint_losses(
            logits,
            labels,
            auxiliary_logits=None if self.auxiliary is None else self.auxiliary(features[-2]),
            auxiliary_weight=self.auxiliary_weight,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
            loss=self.loss,
            **terms,
        )
