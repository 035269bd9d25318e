"""UperNet (arXiv 1807.10221): a feature pyramid over a context module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.blocks import ConvBNReLU, conv_bn_relu
from mcibi_fast.nn.context import resize
from mcibi_fast.nn.decoder import Decoder
from mcibi_fast.nn.within_image import ASPP, PPM

TopContext = Literal["ppm", "aspp"]
MemoryJoins = Literal["before", "after"]


@framework(
    "upernet", "UPerNet", source="arXiv 1807.10221", context="pyramid pooling, feature pyramid"
)
class UperNet(SegmentationHead):
    """A context on the last stage (C_wi, Eq. 3), a feature pyramid over all stages, a classifier.

    With MCIBI++ the pyramid is part of the classifier; ``memory_joins`` says where R_aug enters it.
    Neither the paper nor the released code has UperNet with MCIBI, whose memory loss needs a final
    classifier on Z channels. The choice made here: the pyramid's top is C_wi after the attention
    that relates it to R; the pyramid's maps and R_aug, resized to the finest map, are fused by
    MCIBI's Conv3x3-BN-ReLU into the Z channels that are classified.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        context: the context on the last stage: "ppm" as in the paper, or "aspp" as in several
            published checkpoints of this name.
        within_image: a context of your own to use instead.
        memory_joins: only for MCIBI++. "before" (the default): the pyramid's top is [R_aug, C_wi],
            2 Z wide, as in every published checkpoint. "after": the top is C_wi alone; R_aug is
            resized to the finest map and concatenated after the pyramid, so that a stage of
            iterative inference costs less.
        feats_channels: Z, channels of the context and the pixel representations.
        pyramid_channels: channels of each of the pyramid's maps after its last convolutions; by
            default Z. One published checkpoint (R50, Cityscapes) has 2 Z.
        dropout: channel dropout before each classifier.
        align_corners: whether every bilinear resizing aligns corners.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.

    The logits have the size of the finest map.

    Raises:
        ValueError: an unknown ``context`` or ``memory_joins``.
        TypeError: ``memory_joins`` was given without MCIBI++.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        context: TopContext = "ppm",
        within_image: nn.Module | None = None,
        memory_joins: MemoryJoins | None = None,
        pyramid_channels: int | None = None,
        feats_channels: int = 512,
        dropout: float = 0.1,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        Z = feats_channels
        P = Z if pyramid_channels is None else pyramid_channels
        if P < 1:
            raise ValueError(f"pyramid_channels: expected at least 1, got {P}")
        expanded = (len(in_channels) - 1) * P + Z  # channels of what `expand` returns
        if memory_joins not in (None, "before", "after"):
            raise ValueError(
                f"memory_joins: expected 'before' or 'after' the pyramid, got {memory_joins!r}"
            )
        if self.concatenates_context:
            memory_joins = memory_joins or "before"
        elif memory_joins is not None:
            raise TypeError("memory_joins: only UperNet with MCIBI++ has this option")
        else:
            options["within_channels"] = expanded
        super().__init__(
            num_classes,
            in_channels,
            within_image=within_image
            or partial(_top_context, context, in_channels[-1], Z, align_corners),
            feats_channels=Z,
            dropout=dropout,
            align_corners=align_corners,
            **options,
        )
        self.memory_joins = memory_joins
        top = 2 * Z if memory_joins == "before" else Z
        self.pyramid = FeaturePyramid(in_channels[:-1], top, P, align_corners=align_corners)
        if memory_joins is not None:  # the classifier also takes R_aug
            kernel_size = self.decoder.conv[0].kernel_size[0]
            self.decoder: Any = Decoder(
                expanded + Z, Z, num_classes, kernel_size=kernel_size, dropout=dropout
            )

    def expand(self, features: Sequence[Tensor], within: Tensor) -> Tensor:
        return self.pyramid(features[:-1], within)

    def prepare_classifier(self, features: Sequence[Tensor], within: Tensor | None) -> Any:
        """See :meth:`MemoryHead.prepare_classifier`."""
        assert within is not None
        memory: Any = super()
        if self.memory_joins is None:
            return memory.prepare_classifier(features, within)
        if self.memory_joins == "after":
            return self.decoder.prepare(self.expand(features, within), first=True)
        # Everything up to the 3x3 convolutions treats the channels of the sums separately, so the
        # channels of C_wi are computed once, and so is what they add to the convolutions.
        pyramid, below, Z = self.pyramid, features[:-1], within.shape[1]
        laterals = pyramid.lateral(below)
        fixed = pyramid.sums([m[:, Z:] for m in laterals], within)
        return _Pyramid(
            [m[:, :Z] for m in laterals],
            [o.prepare(m, first=False) for o, m in pyramid.with_outputs(fixed)],
            self.decoder.prepare(resize(within, below[0].shape[2:], self.align_corners)),
        )

    def classify(self, augmented: Tensor, prepared: Any) -> Tensor:
        """See :meth:`MemoryHead.classify`."""
        memory: Any = super()
        if self.memory_joins is None:
            return memory.classify(augmented, prepared)
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


class _Pyramid(NamedTuple):
    """What does not depend on R_aug in a pyramid whose top is [R_aug, C_wi].

    ``laterals``: the first Z channels of the lateral maps, to which R_aug is added. ``outputs`` and
    ``classifier``: what the other Z channels contribute to the convolutions after the sums and to
    the classifier.
    """

    laterals: list[Tensor]
    outputs: list[Tensor]
    classifier: Tensor


def _top_context(name: TopContext, in_channels: int, channels: int, align_corners: bool) -> Any:
    if name not in ("ppm", "aspp"):
        raise ValueError(f"context: expected 'ppm' or 'aspp', got {name!r}")
    module: Any = PPM if name == "ppm" else ASPP
    return module(in_channels, channels, align_corners=align_corners)


class FeaturePyramid(nn.Module):
    """Top-down sums: Conv1x1-BN-ReLU on each finer map, plus the resized sum above it.

    A Conv3x3-BN-ReLU follows each sum. The top map is passed in and goes through no convolution.

    Args:
        in_channels: channels of the maps below the top one, finest first.
        top_channels: channels of the top map and of the sums.
        out_channels: channels of the maps after the last convolutions.
        align_corners: whether every resizing aligns corners.

    Shape: maps and the top map (B, top_channels, h, w) -> their concatenation at the finest size
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
        """The maps below the top one, with as many channels as the sums."""
        if len(features) != len(self.laterals):
            raise ValueError(
                f"features: this pyramid has {len(self.laterals)} maps below the top one, "
                f"got {len(features)}"
            )
        return [lateral(f) for lateral, f in zip(self.laterals, features, strict=True)]

    def sums(self, laterals: Sequence[Tensor], top: Tensor) -> list[Tensor]:
        """Each lateral map plus the resized sum above it, finest first, without the top map.

        Channels do not mix: a subset of the channels of all maps gives that subset of the sums.
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
