"""UperNet: a feature pyramid over a context module; alone, with MCIBI++, with MCIBI."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from mcibi_fast.models.backbones import Pretrained, create_backbone
from mcibi_fast.models.fcn import FCNHead
from mcibi_fast.models.mcibi import MCIBIHead
from mcibi_fast.models.mcibipp import MCIBIPPHead
from mcibi_fast.models.memory_head import MemoryHead
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.nn.blocks import ConvBNReLU, conv_bn_relu
from mcibi_fast.nn.context import resize
from mcibi_fast.nn.decoder import Decoder
from mcibi_fast.nn.within_image import ASPP, PPM

TopContext = Literal["ppm", "aspp"]
MemoryJoins = Literal["before", "after"]


def upernet(
    num_classes: int,
    backbone: str = "resnet50",
    *,
    output_stride: int = 8,
    pretrained: Pretrained = False,
    context: TopContext = "ppm",
    **head_options: Any,
) -> Segmentor:
    """The baseline: a context module on the last stage, a pyramid down to the first, a classifier.

    Args:
        num_classes: K.
        backbone: any timm model with ``features_only``.
        output_stride: of the last stage.
        pretrained: load timm's weights, or those in this file.
        context: on the last stage; "ppm" as in UperNet (arXiv 1807.10221), or "aspp".
        head_options: see :class:`UperNetHead`.
    """
    features = create_backbone(backbone, output_stride=output_stride, pretrained=pretrained)
    head = UperNetHead(num_classes, features.channels, context=context, **head_options)
    return Segmentor(features, head)


def upernet_mcibipp(
    num_classes: int,
    backbone: str = "resnet50",
    *,
    output_stride: int = 8,
    pretrained: Pretrained = False,
    head_type: type[MemoryHead] | None = None,
    context: TopContext = "ppm",
    feats_channels: int = 512,
    align_corners: bool = False,
    **head_options: Any,
) -> Segmentor:
    """UperNet with MCIBI++: the context module's output is C_wi, the pyramid is in the classifier.

    Args:
        num_classes: K.
        backbone: any timm model with ``features_only``.
        output_stride: of the last stage.
        pretrained: load timm's weights, or those in this file.
        head_type: the head with a memory, :class:`UperNetMCIBIPPHead` if None.
        context: on the last stage; "ppm", or "aspp" as in several published checkpoints named
            upernet.
        feats_channels: Z, channels of the context and of the pixel representations.
        align_corners: of every bilinear resizing.
        head_options: see :class:`UperNetMCIBIPPHead`.
    """
    features = create_backbone(backbone, output_stride=output_stride, pretrained=pretrained)
    head = (head_type or UperNetMCIBIPPHead)(
        num_classes,
        features.channels,
        within_image=_top_context(context, features.channels[-1], feats_channels, align_corners),
        feats_channels=feats_channels,
        align_corners=align_corners,
        **head_options,
    )
    return Segmentor(features, head)


def upernet_mcibi(num_classes: int, backbone: str = "resnet50", **options: Any) -> Segmentor:
    """UperNet with MCIBI (:class:`UperNetMCIBIHead`), arguments as for :func:`upernet_mcibipp`."""
    return upernet_mcibipp(num_classes, backbone, head_type=UperNetMCIBIHead, **options)


def _top_context(name: TopContext, in_channels: int, channels: int, align_corners: bool) -> Any:
    if name not in ("ppm", "aspp"):
        raise ValueError(f"context: expected 'ppm' or 'aspp', got {name!r}")
    module: Any = PPM if name == "ppm" else ASPP
    return module(in_channels, channels, align_corners=align_corners)


class FeaturePyramid(nn.Module):
    """Top-down sums: Conv1x1-BN-ReLU on each finer map, plus the resized one above it.

    A Conv3x3-BN-ReLU follows each sum. The top map is given and goes through no convolution.

    Args:
        in_channels: of the maps below the top one, finest first.
        top_channels: of the top map, and of the sums.
        out_channels: of the maps after the last convolutions.
        align_corners: of every resizing.

    Shape: maps and the top map (B, top_channels, h, w) -> all at the finest size, concatenated
        (B, len(in_channels) * out_channels + top_channels, h0, w0).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        top_channels: int,
        out_channels: int,
        *,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(conv_bn_relu(c, top_channels, 1) for c in in_channels)
        self.outputs = nn.ModuleList(
            conv_bn_relu(top_channels, out_channels, 3) for _ in in_channels
        )
        self.align_corners = align_corners

    def forward(self, features: Sequence[Tensor], top: Tensor) -> Tensor:
        sums = self.sums(self.lateral(features), top)
        maps = [output(s) for output, s in self.with_outputs(sums)]
        return self.stack([*maps, top])

    def lateral(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The maps below the top one at the sums' width."""
        if len(features) != len(self.laterals):
            raise ValueError(
                f"features: this pyramid has {len(self.laterals)} maps below the top one, "
                f"got {len(features)}"
            )
        return [lateral(f) for lateral, f in zip(self.laterals, features, strict=True)]

    def sums(self, laterals: Sequence[Tensor], top: Tensor) -> list[Tensor]:
        """Each lateral map plus the resized sum above it, finest first, without the top map.

        Channels do not mix: some of the channels of all maps give those channels of the sums.
        """
        sums = []
        for lateral in reversed(laterals):
            top = lateral + resize(top, lateral.shape[2:], self.align_corners)
            sums.append(top)
        return sums[::-1]

    def with_outputs(self, sums: Sequence[Tensor]) -> Iterator[tuple[ConvBNReLU, Tensor]]:
        """Each sum and the convolution that follows it."""
        outputs = cast(Iterable[ConvBNReLU], self.outputs)
        return zip(outputs, sums, strict=True)

    def stack(self, maps: Sequence[Tensor]) -> Tensor:
        """The maps at the size of the first one, concatenated."""
        size = maps[0].shape[2:]
        return torch.cat([resize(m, size, self.align_corners) for m in maps], dim=1)


class UperNetHead(FCNHead):
    """Classifies a feature pyramid whose top is a context module's output.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        context: the context module.
        feats_channels: Z, channels of the context, the pyramid and the pixel representations.
        dropout: channel dropout before each classifier.
        align_corners: of every bilinear resizing.
        options: more of :class:`FCNHead`'s.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        context: TopContext = "ppm",
        feats_channels: int = 512,
        dropout: float = 0.1,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        Z, maps = feats_channels, len(in_channels)
        super().__init__(
            num_classes,
            in_channels,
            decoder=Decoder(maps * Z, Z, num_classes, kernel_size=3, dropout=dropout),
            feats_channels=Z,
            dropout=dropout,
            align_corners=align_corners,
            **options,
        )
        self.within_image = _top_context(context, in_channels[-1], Z, align_corners)
        self.pyramid = FeaturePyramid(in_channels[:-1], Z, Z, align_corners=align_corners)

    def decoder_input(self, features: Sequence[Tensor]) -> Tensor:
        return self.pyramid(features[:-1], self.within_image(features[-1]))


class _Pyramid(NamedTuple):
    """What R_aug does not change of a pyramid whose top is [R_aug, C_wi].

    ``laterals``: the lateral maps' first Z channels, to which R_aug is added; ``outputs`` and
    ``classifier``: what the other Z make of the convolutions after the sums and of the classifier.
    """

    laterals: list[Tensor]
    outputs: list[Tensor]
    classifier: Tensor


class UperNetMCIBIPPHead(MCIBIPPHead):
    """MCIBI++ with a feature pyramid before the final classifier.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        within_image: the context module, C_wi (Eq. 3).
        memory_joins: where R_aug joins. "before": the pyramid's top is [R_aug, C_wi], 2 Z wide, as
            in every published checkpoint. "after": the top is C_wi alone; R_aug is resized to the
            finest map and concatenated last, so that a stage of iterative inference costs less.
        feats_channels, dropout, align_corners, options: see :class:`MCIBIPPHead`.

    The logits have the size of the finest map.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        within_image: nn.Module,
        memory_joins: MemoryJoins = "before",
        feats_channels: int = 512,
        dropout: float = 0.1,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        if memory_joins not in ("before", "after"):
            raise ValueError(
                f"memory_joins: expected 'before' or 'after' the pyramid, got {memory_joins!r}"
            )
        super().__init__(
            num_classes,
            in_channels,
            within_image=within_image,
            feats_channels=feats_channels,
            dropout=dropout,
            align_corners=align_corners,
            **options,
        )
        Z, below = feats_channels, in_channels[:-1]
        top = 2 * Z if memory_joins == "before" else Z
        self.memory_joins = memory_joins
        self.pyramid = FeaturePyramid(below, top, Z, align_corners=align_corners)
        self.decoder = Decoder(
            (len(below) + 2) * Z,
            Z,
            num_classes,
            kernel_size=self.decoder.conv[0].kernel_size[0],
            dropout=dropout,
        )

    def prepare_classifier(self, features: Sequence[Tensor], within: Tensor | None) -> Any:
        assert within is not None
        pyramid, below = self.pyramid, features[:-1]
        if self.memory_joins == "after":
            return self.decoder.prepare(pyramid(below, within), first=True)
        # Everything up to the 3x3 convolutions treats each channel of the sums by itself, so those
        # of C_wi are computed once, and so is what they add to the convolutions.
        Z = within.shape[1]
        laterals = pyramid.lateral(below)
        fixed = pyramid.sums([m[:, Z:] for m in laterals], within)
        return _Pyramid(
            [m[:, :Z] for m in laterals],
            [o.prepare(m, first=False) for o, m in pyramid.with_outputs(fixed)],
            self.decoder.prepare(resize(within, below[0].shape[2:], self.align_corners)),
        )

    def classify(self, augmented: Tensor, prepared: Any) -> Tensor:
        if self.memory_joins == "after":
            augmented = resize(augmented, prepared.shape[2:], self.align_corners)
            return self.decoder(augmented, prepared, first=True)
        pyramid, image = self.pyramid, prepared
        sums = pyramid.sums(image.laterals, augmented)
        maps = [
            output.join(half, m, first=False)
            for (output, m), half in zip(pyramid.with_outputs(sums), image.outputs, strict=True)
        ]
        return self.decoder(pyramid.stack([*maps, augmented]), image.classifier)


class UperNetMCIBIHead(MCIBIHead):
    """MCIBI over a feature pyramid.

    Neither paper nor released code has this model. MCIBI's memory loss needs a final classifier of
    Z channels, so: the pyramid's top is C_wi related to R; its maps and R_aug, resized to the
    finest, are fused by MCIBI's Conv3x3-BN-ReLU into the Z channels that are classified.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        within_image: the context module, C_wi (Eq. 3).
        feats_channels, align_corners, options: see :class:`MCIBIHead`.

    The logits have the size of the finest map.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        within_image: nn.Module,
        feats_channels: int = 512,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        Z = feats_channels
        super().__init__(
            num_classes,
            in_channels,
            within_image=within_image,
            within_channels=len(in_channels) * Z,
            feats_channels=Z,
            align_corners=align_corners,
            **options,
        )
        self.pyramid = FeaturePyramid(in_channels[:-1], Z, Z, align_corners=align_corners)

    def prepare_classifier(self, features: Sequence[Tensor], within: Tensor | None) -> Any:
        assert within is not None
        return super().prepare_classifier(features, self.pyramid(features[:-1], within))

    def classify(self, augmented: Tensor, prepared: Any) -> Tensor:
        augmented = resize(augmented, prepared.shape[2:], self.align_corners)
        return super().classify(augmented, prepared)
