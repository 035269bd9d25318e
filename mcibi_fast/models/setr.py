"""SETR (arXiv 2012.15840): convolutional decoders on the maps of a transformer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.models.late import LateMemory, refuse_within_image
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.blocks import conv_bn_relu
from mcibi_fast.nn.context import resize
from mcibi_fast.nn.decoder import UpsamplingDecoder

SETRDecoder = Literal["mla", "pup", "naive"]
# Of the decoders on the last map alone: convolutions, their kernel size, and the factor after each.
_UPSAMPLING = {"pup": (4, 3, 2), "naive": (2, 1, 4)}


class _Decoded(NamedTuple):
    """What is classified, or what is prepared of it, and the maps of the auxiliary heads."""

    main: Any
    auxiliary: list[Tensor]


@framework("setr", "SETR", source="arXiv 2012.15840", context="none (a ViT's blocks)")
class SETR(LateMemory):
    """Layer norm on every map of a transformer, a decoder, and three auxiliary heads.

    "mla": multi-level aggregation (:class:`MultiLevel`) of all maps, at four times their size.
    "pup" and "naive": convolutions and larger sizes on the last map, four times 3x3 and 2x, or
    twice 1x1 and 4x. The auxiliary heads are twice Conv-BN-ReLU and 4x, on the shallower maps.

    With a memory, R comes from the last map. "mla" combines as
    :class:`mcibi_fast.models.late.LateMemory` says; the other decoders take R_aug instead of the
    last map.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's maps, which all have one stride, shallowest first.
        decoder: one of the three above.
        norms: layer norm on every map; False for a backbone that has it already.
        mla_channels: channels of the sums of "mla".
        up_channels: channels of each map after the sums; of all convolutions in "pup" and "naive".
            By default 128 and 256.
        auxiliary_channels: channels in the auxiliary heads.
        auxiliary_convs: number of convolutions in each auxiliary head, each followed by 4x.
        auxiliary_weight: weight of each of their losses; 0 leaves them out.
        feats_channels: Z, channels of the pixel representations of a model with a memory.
        dropout: channel dropout before each classifier.
        align_corners: whether every bilinear resizing aligns corners.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.

    Raises:
        ValueError: an unknown ``decoder``.
        TypeError: ``within_image``, which this framework does not have.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        decoder: SETRDecoder = "mla",
        norms: bool = True,
        mla_channels: int = 256,
        up_channels: int | None = None,
        auxiliary_channels: int = 256,
        auxiliary_convs: int = 2,
        auxiliary_weight: float = 0.4,
        feats_channels: int = 512,
        dropout: float = 0.0,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        if decoder != "mla" and decoder not in _UPSAMPLING:
            raise ValueError(f"decoder: expected 'mla', 'pup' or 'naive', got {decoder!r}")
        refuse_within_image(self, options)
        super().__init__(
            num_classes,
            in_channels,
            feats_channels=feats_channels,
            dropout=dropout,
            auxiliary_weight=0.0,  # of the usual head; SETR has its own ones
            align_corners=align_corners,
            **options,
        )
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in in_channels if norms)
        if decoder == "mla":
            up = up_channels or 128
            self.levels: Any = MultiLevel(
                in_channels, mla_channels, up, align_corners=align_corners
            )
            self._add_classifier(up * len(in_channels), feats_channels, dropout)
            widths, kernel_size = [mla_channels] * (len(in_channels) - 1), 3
        else:
            convs, kernel_size, scale = _UPSAMPLING[decoder]
            self.levels = None
            self.decoder: Any = UpsamplingDecoder(
                feats_channels if self.has_memory else in_channels[-1],
                up_channels or 256,
                num_classes,
                dropout=dropout,
                convs=convs,
                kernel_size=kernel_size,
                scale=scale,
                mode="bilinear",
                align_corners=align_corners,
            )
            widths = list(in_channels[:-1])
        self.auxiliaries = nn.ModuleList(
            UpsamplingDecoder(
                width,
                auxiliary_channels,
                num_classes,
                dropout=dropout,
                convs=auxiliary_convs,
                kernel_size=kernel_size,
                mode="bilinear",
                align_corners=align_corners,
            )
            for width in widths
            if auxiliary_weight
        )
        self.auxiliary_weight = auxiliary_weight

    def normalised(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The maps after their layer norms, which run over the channels of each pixel."""
        if not self.norms:
            return list(features)
        pairs = zip(self.norms, features, strict=True)
        return [norm(m.movedim(1, 3)).movedim(3, 1) for norm, m in pairs]

    def pixel_representations(self, features: Sequence[Tensor]) -> Tensor:
        """R (B, Z, h, w); without a memory what the last layer classifies."""
        base: Any = super()
        if self.has_memory:
            return base.pixel_representations(self.normalised(features))
        if self.levels is not None:
            return self._decoded(features).main
        return self.decoder.hidden(self.normalised(features)[-1])

    def decoder_input(self, features: Sequence[Tensor]) -> tuple[Any, None]:
        """See :meth:`PlainHead.decoder_input`."""
        return self._decoded(features), None

    def predict(self, maps: Any, further: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PlainHead.predict`; the further predictions are the auxiliary heads'."""
        return self.decoder(maps.main), self._auxiliary(maps.auxiliary) if further else {}

    def prepare_classifier(self, features: Sequence[Tensor], within: Tensor | None) -> Any:
        """See :meth:`MemoryHead.prepare_classifier`."""
        decoded = self._decoded(features)
        if self.levels is None:
            return decoded._replace(main=None)
        return decoded._replace(main=self.prepare_decoded(decoded.main))

    def classify(self, augmented: Tensor, prepared: Any) -> Tensor:
        """See :meth:`MemoryHead.classify`."""
        if self.levels is None:
            return self.decoder(augmented)
        return super().classify(augmented, prepared.main)

    def finish(
        self, logits: Tensor, prepared: Any, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`MemoryHead.finish`."""
        if labels is None:
            return logits, {}
        return logits, self.further_losses(self._auxiliary(prepared.auxiliary), labels)

    def further_losses(self, further: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """``loss_aux1``, ``loss_aux2``, ...: the losses of the auxiliary heads."""
        losses = super().further_losses(further, labels)
        return {name: self.auxiliary_weight * loss for name, loss in losses.items()}

    def _decoded(self, features: Sequence[Tensor]) -> _Decoded:
        maps = self.normalised(features)
        if self.levels is None:
            return _Decoded(maps[-1], maps[:-1])
        levels = self.levels.aggregate(maps)
        return _Decoded(self.levels.enlarge(levels), levels[1:])

    def _auxiliary(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """The auxiliary heads' logits; there may be none."""
        pairs = zip(self.auxiliaries, maps, strict=False)
        return {f"loss_aux{i}": head(m) for i, (head, m) in enumerate(pairs, 1)}


class MultiLevel(nn.Module):
    """Multi-level aggregation: sums from the deepest map to the shallowest.

    Conv1x1-BN-ReLU on each map, and the size of the deepest one if a map has another; running sums
    that begin with the deepest, Conv3x3-BN-ReLU on each sum (``aggregate``); then twice
    Conv3x3-BN-ReLU and four times the size on each, concatenated (``enlarge``).

    Args:
        in_channels: channels of the maps, shallowest first.
        channels: channels of the sums.
        up_channels: channels of each enlarged map.
        align_corners: whether the resizing aligns corners.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        up_channels: int,
        *,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(conv_bn_relu(c, channels, 1) for c in in_channels)
        # These two have the order of the sums, deepest first.
        self.extract = nn.ModuleList(conv_bn_relu(channels, channels, 3) for _ in in_channels)
        self.up = nn.ModuleList(
            nn.Sequential(
                conv_bn_relu(channels, up_channels, 3), conv_bn_relu(up_channels, up_channels, 3)
            )
            for _ in in_channels
        )
        self.align_corners = align_corners

    def aggregate(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The sums after their convolutions, deepest first."""
        size = maps[-1].shape[2:]
        reduced = [
            resize(reduce(m), size, self.align_corners)
            for reduce, m in zip(self.reduce, maps, strict=True)
        ]
        sums = itertools.accumulate(reversed(reduced), torch.add)
        return [extract(m) for extract, m in zip(self.extract, sums, strict=True)]

    def enlarge(self, levels: Sequence[Tensor]) -> Tensor:
        """The result of ``aggregate`` at four times the size, concatenated."""
        enlarged = (
            F.interpolate(
                up(level), scale_factor=4.0, mode="bilinear", align_corners=self.align_corners
            )
            for up, level in zip(self.up, levels, strict=True)
        )
        return torch.cat(list(enlarged), dim=1)
