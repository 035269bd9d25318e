"""SemanticFPN (arXiv 1901.02446): the sum of a feature pyramid's maps, classified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mcibi_fast.models.late import LateMemory, auxiliary_default, refuse_within_image
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.semantic_pyramid import SemanticPyramid


@framework("semanticfpn", "SemanticFPN", source="arXiv 1901.02446", context="feature pyramid")
class SemanticFPN(LateMemory):
    """A feature pyramid over all stages, the sum of its maps at the finest size, a classifier.

    The released models have a backbone of output stride 32, batch norm instead of the paper's group
    norm, and BN-ReLU also after the pyramid's own convolutions, which the paper leaves linear.

    With a memory see :class:`mcibi_fast.models.late.LateMemory`.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        strides: strides of these maps; :func:`mcibi_fast.models.create` passes the backbone's.
        pyramid_channels: channels of the pyramid.
        sum_channels: channels of the sum.
        feats_channels: Z, channels of the pixel representations of a model with a memory.
        dropout: channel dropout before each classifier.
        auxiliary_weight: weight of the auxiliary head's loss; the released models have none. With a
            memory 0.4 if None.
        align_corners: whether every bilinear resizing aligns corners.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.

    The logits have the size of the finest map.

    Raises:
        TypeError: ``within_image``, which this framework does not have.
    """

    takes_strides = True

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        strides: Sequence[int] = (4, 8, 16, 32),
        pyramid_channels: int = 256,
        sum_channels: int = 128,
        feats_channels: int = 512,
        dropout: float = 0.1,
        auxiliary_weight: float | None = None,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        refuse_within_image(self, options)
        super().__init__(
            num_classes,
            in_channels,
            feats_channels=feats_channels,
            dropout=dropout,
            auxiliary_weight=auxiliary_default(self, auxiliary_weight),
            align_corners=align_corners,
            **options,
        )
        self.pyramid = SemanticPyramid(
            in_channels,
            pyramid_channels,
            sum_channels,
            strides=strides,
            align_corners=align_corners,
        )
        self._add_classifier(sum_channels, feats_channels, dropout)

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        total: Tensor = self.pyramid(features)[0]
        return total
