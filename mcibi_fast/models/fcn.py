"""FCN (Long et al., 2015): no context within the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mcibi_fast.models.head import SegmentationHead
from mcibi_fast.models.registry import framework
from mcibi_fast.nn.blocks import conv_bn_relu


@framework("fcn", "FCN", source="arXiv 1411.4038", context="none")
class FCN(SegmentationHead):
    """Conv3x3-BN-ReLU on the last stage, then a classifier.

    With MCIBI++ or MCIBI (the first rows of Tables 1 and 3) the dataset-level context comes between
    R and the classifier.

    Args:
        num_classes: K.
        in_channels: channels of the backbone's feature maps, finest first.
        convs: number of Conv3x3-BN-ReLU; the released FCN has 2. Only without a memory.
        feats_channels: Z, channels of the pixel representations.
        options: further options of :class:`PlainHead`, :class:`MCIBIPPHead` or :class:`MCIBIHead`.

    Raises:
        ValueError: ``convs`` is less than 1.
        TypeError: more than one with a memory.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        convs: int = 1,
        feats_channels: int = 512,
        **options: Any,
    ) -> None:
        if convs < 1:
            raise ValueError(f"convs: expected at least 1, got {convs}")
        if convs > 1:
            if self.has_memory:
                raise TypeError("convs: only FCN without a memory has this option")
            options["within_image"] = lambda: nn.Sequential(
                conv_bn_relu(in_channels[-1], feats_channels, 3),
                *(conv_bn_relu(feats_channels, feats_channels, 3) for _ in range(convs - 1)),
            )
        super().__init__(num_classes, in_channels, feats_channels=feats_channels, **options)
