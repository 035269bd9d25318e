"""Builds the head of a released checkpoint, with fresh weights, from its entries' shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mcibi_fast.compat import shapes
from mcibi_fast.compat.shapes import WITHIN_IMAGE, StateDict, shape
from mcibi_fast.models import MCIBIHead, MCIBIPPHead, SegmentationHead, head_type
from mcibi_fast.nn.blocks import use_leaky_relu
from mcibi_fast.nn.within_image import ASPP, PPM

_VALUE = "memory_module.self_attention.value_project.0.weight"


def build_head(
    state: StateDict,
    *,
    dilations: Sequence[int],
    pool_scales: Sequence[int],
    negative_slope: float,
    weights_from: str,
    hard: bool,
    **options: Any,
) -> SegmentationHead:
    """The head; for the arguments see :func:`mcibi_fast.compat.sssegmentation.head`.

    Raises:
        ValueError: it is another kind of checkpoint, or it has no such head.
    """
    method = shapes.method_of(state)
    if method != "isnet":
        options |= {"weights_from": weights_from, "hard": hard}
        options["within_image"] = _within_image(
            state,
            dilations=dilations,
            pool_scales=pool_scales,
            align_corners=options.get("align_corners", False),
        )
    auxiliary = shapes.auxiliary_widths(state)
    if not auxiliary:
        options["auxiliary_weight"] = 0.0
    elif len(auxiliary) > 1:
        options["auxiliary_heads"] = len(auxiliary)
    Z, last = shape(state, "bottleneck.0.weight", 2)[:2]
    options["feats_channels"] = Z
    build = {"mcibiplusplus": _mcibipp, "mcibi": _mcibi, "isnet": _isnet}[method]
    head = build(state, [*(auxiliary or [last]), last], options)
    if negative_slope:
        use_leaky_relu(head, negative_slope)
    return head


def _mcibipp(state: StateDict, widths: list[int], options: dict[str, Any]) -> SegmentationHead:
    framework: Any = MCIBIPPHead
    laterals = shapes.laterals(state)
    if laterals:
        if options["within_image"] is None:
            raise ValueError(
                f"checkpoint: it has a feature pyramid (lateral_convs.*) but no {WITHIN_IMAGE}.*, "
                "which every UperNet of the released code has"
            )
        framework = head_type("upernet", "mcibipp")
        widths = [*(lateral[1] for lateral in laterals), widths[-1]]
        # The laterals have the width of the pyramid's top: [memory, context] or the context alone.
        joins_after = laterals[0][0] == options["feats_channels"]
        options["memory_joins"] = "after" if joins_after else "before"
        options["pyramid_channels"] = shape(state, "fpn_convs.0.0.weight")[0]
    return framework(
        shape(state, shapes.MEMORY)[0],
        widths,
        form="released",
        transform_channels=shape(state, _VALUE)[0],
        extra_attention="self_attention.value_project.0.weight" in state,
        kernel_sizes=shapes.kernel_sizes(state),
        downsample="memory_module.downsample_before_sa.0.weight" in state,
        **options,
    )


def _mcibi(state: StateDict, widths: list[int], options: dict[str, Any]) -> SegmentationHead:
    K, n, _ = shape(state, shapes.MEMORY, 3)
    value = _VALUE if n == 1 else _VALUE.replace("attention.", "attentions.0.")
    return MCIBIHead(
        K,
        widths,
        form="released",
        transform_channels=shape(state, value)[0],
        representations=n,
        **options,
    )


def _isnet(state: StateDict, widths: list[int], options: dict[str, Any]) -> SegmentationHead:
    transform_channels = shape(state, "ilc_net.correlate_net.value_project.0.weight")[0]
    if "shortcut.0.weight" in state:
        channels, finest = shape(state, "shortcut.0.weight", 2)[:2]
        options["shortcut_channels"] = channels
        widths = [finest, *widths]
    return head_type("isnet")(
        shapes.classes_of(state), widths, transform_channels=transform_channels, **options
    )


def _within_image(
    state: StateDict, *, dilations: Sequence[int], pool_scales: Sequence[int], align_corners: bool
) -> nn.Module | None:
    kind = shapes.context_of(state)
    if kind == "none":
        return None
    Z, last = shape(state, "bottleneck.0.weight", 2)[:2]
    if kind == "aspp":
        return ASPP(last, Z, dilations=dilations, align_corners=align_corners)
    branches = shapes.branches_of(state)
    if branches != len(pool_scales):
        raise ValueError(
            f"pool_scales: the checkpoint has {branches} branches, got {tuple(pool_scales)}"
        )
    return PPM(last, Z, pool_scales=pool_scales, align_corners=align_corners)
