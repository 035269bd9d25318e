"""What the checkpoints of several frameworks have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mcibi_fast.compat.names import Rules
from mcibi_fast.compat.shapes import shape


def attended(before: str, block: str, after: str) -> Rules:
    """Names of a head around :class:`mcibi_fast.nn.within_image.AttendedContext`.

    Args:
        before, block, after: the checkpoint's names of its parts.
    """
    return [
        (r"^decoder\.conv\.before\.", f"{before}."),
        (r"^decoder\.conv\.attention\.", f"{block}."),
        (r"^decoder\.conv\.after\.", f"{after}."),
        *fused(),
    ]


def fused() -> Rules:
    """Names of the last convolutions if the context ends with Conv3x3-BN-ReLU, ``fuse``."""
    return [
        (r"^decoder\.conv\.fuse\.", "decoder."),
        (r"^decoder\.classifier\.", "decoder.4."),
    ]


def widths(state: Mapping[str, Tensor], classifier: str = "decoder.4.weight") -> dict[str, Any]:
    """``num_classes`` and ``feats_channels``, from the classifier's weight (K, Z, 1, 1)."""
    num_classes, channels = shape(state, classifier, 2)[:2]
    return {"num_classes": num_classes, "feats_channels": channels}


PYRAMID: Rules = [
    (r"^pyramid\.laterals\.", "fpn_neck.lateral_convs."),
    (r"^pyramid\.outputs\.", "fpn_neck.fpn_convs."),
    *((rf"^pyramid\.heads\.(\d+)\.{i}\.", rf"scale_heads.\1.{2 * i}.") for i in range(3)),
]
"""Names of a :class:`mcibi_fast.nn.semantic_pyramid.SemanticPyramid`."""

POOLED: Rules = [
    (r"^within_image\.pyramid\.", "ppm_net.branches."),
    (r"^within_image\.", "ppm_net."),
]
"""Names of a PPM."""


def pyramid_channels(state: Mapping[str, Tensor]) -> int:
    """Channels of the pyramid whose names are ``PYRAMID``."""
    return shape(state, "fpn_neck.fpn_convs.0.0.weight")[0]


def projections(own: str, released: str) -> Rules:
    """Names of an attention's projections, and of the attention.

    Args:
        own: the attention's name, as a regular expression.
        released: the checkpoint's name of it.
    """
    return [
        *(
            (rf"^{own}\.{name}\.", f"{released}.{theirs}_project.")
            for name, theirs in (
                ("query", "query"),
                ("key", "key"),
                ("value", "value"),
                ("output", "out"),
            )
        ),
        (rf"^{own}\.", f"{released}."),
    ]


def upsampling(own: str, released: str, *, convs: int) -> Rules:
    """Names of an :class:`mcibi_fast.nn.decoder.UpsamplingDecoder` with so many convolutions.

    Args:
        own: its name, as a regular expression.
        released: the checkpoint's name of it, which may refer to groups of ``own``.
        convs: number of convolutions.
    """
    blocks = [
        (rf"^{own}\.blocks\.{i}\.{part}\.", f"{released}.{4 * i + part}.")
        for i in range(convs)
        for part in (0, 1)
    ]
    return [*blocks, (rf"^{own}\.classifier\.", f"{released}.{4 * convs + 1}.")]


def upsampled(*, convs: int) -> Rules:
    """Names of SETR's head with an upsampling decoder."""
    return [
        *upsampling(r"auxiliaries\.(\d+)", r"auxiliary_decoders.\1", convs=2),
        *upsampling("decoder", "decoder", convs=convs),
    ]


def upsampled_options(state: Mapping[str, Tensor], decoder: str, classifier: str) -> dict[str, Any]:
    """Options of SETR's head with an upsampling decoder, whose maps the backbone normalises."""
    num_classes, channels = shape(state, classifier, 2)[:2]
    return {
        "num_classes": num_classes,
        "decoder": decoder,
        "norms": False,
        "up_channels": channels,
        "auxiliary_channels": shape(state, "auxiliary_decoders.0.0.weight")[0],
        "auxiliary_weight": 0.4,
    }
