"""ISNet: image-level and semantic-level context within the image; alone, MCIBI++, MCIBI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mcibi_fast.models.backbones import Pretrained, create_backbone
from mcibi_fast.models.fcn import FCNHead
from mcibi_fast.models.mcibi import MCIBIHead
from mcibi_fast.models.mcibipp import MCIBIPPHead
from mcibi_fast.models.memory_head import MemoryHead
from mcibi_fast.models.output import SegmentationOutput
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.decoder import Decoder
from mcibi_fast.nn.within_image import ISNetContext


def isnet(
    num_classes: int,
    backbone: str = "resnet50",
    *,
    output_stride: int = 8,
    pretrained: Pretrained = False,
    **head_options: Any,
) -> Segmentor:
    """The baseline: both contexts on the last stage, the second one guided by a first prediction.

    Args:
        num_classes: K.
        backbone: any timm model with ``features_only``.
        output_stride: of the last stage.
        pretrained: load timm's weights, or those in this file.
        head_options: see :class:`ISNetHead`.
    """
    features = create_backbone(backbone, output_stride=output_stride, pretrained=pretrained)
    return Segmentor(features, ISNetHead(num_classes, features.channels, **head_options))


def isnet_mcibipp(
    num_classes: int,
    backbone: str = "resnet50",
    *,
    output_stride: int = 8,
    pretrained: Pretrained = False,
    **head_options: Any,
) -> Segmentor:
    """ISNet with MCIBI++: ISNet's two contexts are C_wi (Eq. 3).

    Args:
        num_classes: K.
        backbone: any timm model with ``features_only``.
        output_stride: of the last stage.
        pretrained: load timm's weights, or those in this file.
        head_options: see :class:`ISNetMCIBIPPHead`.
    """
    features = create_backbone(backbone, output_stride=output_stride, pretrained=pretrained)
    return Segmentor(features, ISNetMCIBIPPHead(num_classes, features.channels, **head_options))


def isnet_mcibi(
    num_classes: int,
    backbone: str = "resnet50",
    *,
    output_stride: int = 8,
    pretrained: Pretrained = False,
    **head_options: Any,
) -> Segmentor:
    """ISNet with MCIBI: ISNet's two contexts are MCIBI's context within the image.

    Args:
        num_classes: K.
        backbone: any timm model with ``features_only``.
        output_stride: of the last stage.
        pretrained: load timm's weights, or those in this file.
        head_options: see :class:`ISNetMCIBIHead`.
    """
    features = create_backbone(backbone, output_stride=output_stride, pretrained=pretrained)
    return Segmentor(features, ISNetMCIBIHead(num_classes, features.channels, **head_options))


class ISNetHead(FCNHead):
    """R, a first prediction on it, the two contexts of both, and a classifier on these.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        feats_channels: Z, channels of R and of the contexts.
        transform_channels: width of the contexts' attentions.
        dropout: channel dropout before each classifier.
        first_weight: of the first prediction's loss, ``loss_pr``.
        options: more of :class:`FCNHead`'s.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        feats_channels: int = 512,
        transform_channels: int = 256,
        dropout: float = 0.1,
        first_weight: float = 0.4,
        **options: Any,
    ) -> None:
        Z = feats_channels
        super().__init__(
            num_classes,
            in_channels,
            decoder=Decoder(Z, Z, num_classes, dropout=dropout, conv=nn.Identity()),
            feats_channels=Z,
            dropout=dropout,
            **options,
        )
        self.bottleneck = conv_bn_relu(in_channels[-1], Z, 3)
        self.first_decoder = Decoder(Z, Z, num_classes, dropout=dropout)
        self.within_image = ISNetContext(Z, transform_channels)
        self.first_weight = first_weight

    def decoder_input(self, features: Sequence[Tensor]) -> Tensor:
        return self._context(features)[0]

    def forward(
        self, features: Sequence[Tensor], labels: Tensor | None = None
    ) -> SegmentationOutput:
        context, first = self._context(features)
        logits = self.decoder(context)
        losses = {}
        if labels is not None:
            losses = self.losses(
                features, logits, labels, weight_logits=first, alpha=self.first_weight
            )
        return SegmentationOutput(logits, losses)

    def _context(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The semantic-level context (B, Z, h, w) and the first prediction's logits."""
        R = self.bottleneck(features[-1])
        first = self.first_decoder(R)
        return self.within_image(R, first), first


class _ISNetMemoryHead(MemoryHead):
    """ISNet's contexts as the context within the image, whichever the memory."""

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        feats_channels: int = 512,
        transform_channels: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            in_channels,
            within_image=ISNetContext(feats_channels, transform_channels),
            feats_channels=feats_channels,
            transform_channels=transform_channels,
            **options,
        )


class ISNetMCIBIPPHead(_ISNetMemoryHead, MCIBIPPHead):
    """MCIBI++ with ISNet's contexts within the image.

    The paper's Table 9 has this model, but neither says how it is put together nor was it ever
    released. Chosen here: both parts begin alike, with Conv3x3-BN-ReLU to R and a prediction on R,
    so they share them. H_pr's logits also guide the semantic-level context; that context is C_wi,
    with a head of its own (Eq. 3) as for any other context within the image.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        feats_channels, transform_channels, options: see :class:`MCIBIPPHead`;
            ``transform_channels`` is also the width of the contexts' attentions.
    """

    def within_image_context(
        self, features: Sequence[Tensor], R: Tensor, weight_logits: Tensor
    ) -> Tensor | None:
        return None if self.within_image is None else self.within_image(R, weight_logits)


class ISNetMCIBIHead(_ISNetMemoryHead, MCIBIHead):
    """MCIBI with ISNet's contexts within the image, put together as in :class:`ISNetMCIBIPPHead`.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        feats_channels, transform_channels, options: see :class:`MCIBIHead`;
            ``transform_channels`` is also the width of the contexts' attentions.
    """

    def raw_context(self, features: Sequence[Tensor], R: Tensor, weight_logits: Tensor) -> Tensor:
        assert self.within_image is not None
        return self.within_image(R, weight_logits)
