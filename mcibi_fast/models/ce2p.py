"""CE2P (arXiv 1809.05996): pyramid pooling, a decoder on the finest map, and edges of classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast import ops
from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.late import auxiliary_default
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.blocks import conv_bn_relu, use_leaky_relu
from mcibi_fast.nn.context import resize
from mcibi_fast.nn.decoder import Decoder
from mcibi_fast.nn.within_image import PPM

EdgeMean = Literal["pixels", "weights"]


class Edges(nn.Module):
    """Features and logits of the classes' edges, from all stages but the last.

    Conv1x1-BN-ReLU on each map; one 3x3 convolution, the same on all of these, to two logits (no
    edge, edge); everything resized to the finest map; a 1x1 convolution of all logits.

    Args:
        in_channels: channels of the maps, finest first.
        channels: channels of each map's features.
        align_corners: whether every resizing aligns corners.

    Shape: maps -> features (B, len(in_channels) * channels, h0, w0), logits (B, 2, h0, w0).
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int = 256, *, align_corners: bool = False
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv_bn_relu(c, channels, 1) for c in in_channels)
        self.edge = nn.Conv2d(channels, 2, 3, padding=1)
        self.fuse = nn.Conv2d(2 * len(in_channels), 2, 1)
        self.align_corners = align_corners

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        maps = [branch(m) for branch, m in zip(self.branches, maps, strict=True)]
        features, logits = (self._join(x) for x in (maps, [self.edge(m) for m in maps]))
        return features, self.fuse(logits)

    def _join(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        return torch.cat([resize(m, size, self.align_corners) for m in maps], dim=1)


class _Maps(NamedTuple):
    """What the first classifier's convolutions take, and the edges' features and logits."""

    fine: Tensor
    edges: Tensor
    edge_logits: Tensor


@framework("ce2p", "CE2P", source="arXiv 1809.05996", context="pyramid pooling, edges")
class CE2P(SegmentationHead):
    """Pyramid pooling (C_wi, Eq. 3), a decoder on the finest map, edges, and a second decoder.

    The first decoder takes the context, resized to the finest map, and a few channels of that map.
    It has a classifier whose loss is ``loss_stage1``. The second takes the result and the edges'
    features; it gives the logits. ``loss_edge`` is the cross entropy of the edges' logits, where
    the two classes weigh the same in total. Edges are found in the labels (:func:`edge_targets`).
    Pixels without a label do not count; in the released code they count as no edge, except those
    that were added to fill a crop.

    With MCIBI++ the context is [R_aug, C_wi], and the first decoder has no classifier. With MCIBI
    the classifier's Conv3x3-BN-ReLU on all these maps and R_aug takes the decoders' place. The
    papers have neither.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        pool_scales: regions per side at each level of the pyramid; one branch for each.
        shortcut_channels: channels of the finest map in the first decoder.
        edge_channels: channels of each map's features for the edges.
        edge_mean: what ``loss_edge`` divides by: the number of "pixels" (released for VOC), or the
            sum of their "weights" (for LIP, CIHP and ATR).
        slope: of the head's LeakyReLUs for negative inputs; 0 means ReLU.
        within_image: a context of your own to use instead of the pyramid.
        feats_channels: Z, channels of the context and of the pixel representations.
        dropout: channel dropout before each classifier but that of the first decoder.
        auxiliary_weight: weight of the auxiliary head's loss; the released models have none. With a
            memory 0.4 if None.
        align_corners: whether every bilinear resizing aligns corners.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.

    The logits have the size of the finest map.

    Raises:
        ValueError: an unknown ``edge_mean``.
    """

    one_logit = False

    context_fuse: Any

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        shortcut_channels: int = 48,
        edge_channels: int = 256,
        edge_mean: EdgeMean = "pixels",
        slope: float = 0.01,
        within_image: nn.Module | None = None,
        feats_channels: int = 512,
        dropout: float = 0.1,
        auxiliary_weight: float | None = None,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        if edge_mean not in get_args(EdgeMean):
            raise ValueError(f"edge_mean: expected 'pixels' or 'weights', got {edge_mean!r}")
        Z, K = feats_channels, num_classes
        edges = edge_channels * (len(in_channels) - 1)
        fine = Z + shortcut_channels
        if not self.concatenates_context:
            options["within_channels"] = fine + edges
        context = partial(
            PPM, in_channels[-1], Z, pool_scales=pool_scales, align_corners=align_corners
        )
        super().__init__(
            num_classes,
            in_channels,
            within_image=within_image or context,
            feats_channels=Z,
            dropout=dropout,
            auxiliary_weight=auxiliary_default(self, auxiliary_weight),
            align_corners=align_corners,
            **options,
        )
        self.shortcut = conv_bn_relu(in_channels[0], shortcut_channels, 1)
        self.edges = Edges(in_channels[:-1], edge_channels, align_corners=align_corners)
        self.first: Any = None
        if not self.has_memory:
            self.first = Decoder(fine, Z, K, dropout=0.0, conv=_two_convs(fine, Z))
        elif self.concatenates_context:
            self.first = _two_convs(Z + fine, Z)
        if self.first is not None:
            convs = _two_convs(Z + edges, Z)
            self.decoder: Any = Decoder(Z + edges, Z, K, dropout=dropout, conv=convs)
        self.edge_mean = edge_mean
        if slope:
            use_leaky_relu(self, slope)

    def pixel_representations(self, features: Sequence[Tensor]) -> Tensor:
        """R (B, Z, h, w); without a memory what the last classifier takes, at the finest size."""
        base: Any = super()
        if self.has_memory:
            return base.pixel_representations(features)
        maps = self.decoder_input(features)[0]
        return self.decoder.conv(torch.cat([self.first.conv(maps.fine), maps.edges], dim=1))

    def decoder_input(self, features: Sequence[Tensor]) -> tuple[Any, None]:
        """See :meth:`PlainHead.decoder_input`."""
        return self._maps(features, self.gather_within_image(features, None, None)), None

    def predict(self, maps: Any, further: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PlainHead.predict`."""
        hidden = self.first.conv(maps.fine)
        logits = self.decoder(torch.cat([hidden, maps.edges], dim=1))
        if not further:
            return logits, {}
        first = self.first.classifier(self.first.dropout(hidden))
        return logits, {"loss_stage1": first, "loss_edge": maps.edge_logits}

    def prepare_classifier(self, features: Sequence[Tensor], within: Tensor | None) -> Any:
        """See :meth:`MemoryHead.prepare_classifier`."""
        assert within is not None
        maps = self._maps(features, within)
        if self.concatenates_context:
            return maps
        fixed = torch.cat([maps.fine, maps.edges], dim=1)
        return maps._replace(fine=self.context_fuse.prepare(fixed, first=True))

    def classify(self, augmented: Tensor, prepared: Any) -> Tensor:
        """See :meth:`MemoryHead.classify`."""
        augmented = resize(augmented, prepared.fine.shape[2:], self.align_corners)
        if not self.concatenates_context:
            return self.decoder(self.context_fuse.join(prepared.fine, augmented, first=True))
        hidden = self.first(torch.cat([augmented, prepared.fine], dim=1))
        return self.decoder(torch.cat([hidden, prepared.edges], dim=1))

    def finish(
        self, logits: Tensor, prepared: Any, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`MemoryHead.finish`."""
        if labels is None:
            return logits, {}
        return logits, self.further_losses({"loss_edge": prepared.edge_logits}, labels)

    def further_losses(self, further: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """``loss_stage1`` and ``loss_edge``; see :meth:`SegmentationHead.further_losses`."""
        others = {name: logits for name, logits in further.items() if name != "loss_edge"}
        losses = super().further_losses(others, labels)
        losses["loss_edge"] = edge_loss(
            further["loss_edge"],
            edge_targets(labels, self.ignore_index),
            mean=self.edge_mean,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
        )
        return losses

    def _maps(self, features: Sequence[Tensor], within: Tensor) -> _Maps:
        fine = self.shortcut(features[0])
        within = resize(within, fine.shape[2:], self.align_corners)
        return _Maps(torch.cat([within, fine], dim=1), *self.edges(features[:-1]))


def edge_targets(labels: Tensor, ignore_index: int) -> Tensor:
    """1 near a change between two classes, 0 elsewhere, ignored where the label is.

    A change between neighbours, also diagonal ones, marks one of the two pixels and the eight
    pixels around it.

    Args:
        labels: (B, H, W), any integer dtype.
        ignore_index: label that is no class.

    Returns:
        (B, H, W) int64.
    """
    labels = labels.long()
    edges = torch.zeros_like(labels, dtype=torch.float32)
    every, but_first, but_last = slice(None), slice(1, None), slice(None, -1)
    # Which pixel of two neighbours is marked: the lower, the left, the upper left, the upper right.
    for marked, other in (
        ((every, but_first), (every, but_last)),
        ((every, every, but_last), (every, every, but_first)),
        ((every, but_last, but_last), (every, but_first, but_first)),
        ((every, but_last, but_first), (every, but_first, but_last)),
    ):
        a, b = labels[marked], labels[other]
        changes = (a != b) & (a != ignore_index) & (b != ignore_index)
        edges[marked] = edges[marked].masked_fill(changes, 1)
    near = F.max_pool2d(edges[:, None], 3, stride=1, padding=1)[:, 0].long()
    return near.masked_fill(labels == ignore_index, ignore_index)


def edge_loss(
    logits: Tensor, targets: Tensor, *, mean: EdgeMean, ignore_index: int, align_corners: bool
) -> Tensor:
    """Cross entropy of (no edge, edge), each weighted by the other's share of the batch's pixels.

    Args:
        logits: (B, 2, h, w), before the upsampling.
        targets: the result of :func:`edge_targets`.
        mean: see :class:`CE2P`.
        ignore_index, align_corners: as in ``ops.upsample_cross_entropy``.
    """
    counts = torch.stack([(targets == kind).sum() for kind in (1, 0)]).float()
    pixels = counts.sum().clamp(min=1)
    weight = counts / pixels
    losses = ops.upsample_cross_entropy(
        logits,
        targets,
        weight=weight,
        ignore_index=ignore_index,
        align_corners=align_corners,
        reduction="none",
    )
    total = pixels if mean == "pixels" else (2 * weight.prod() * pixels).clamp(min=1)
    return losses.sum() / total


def _two_convs(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        conv_bn_relu(in_channels, channels, 1), conv_bn_relu(channels, channels, 1)
    )
