"""What the entries of a released checkpoint show: its method, its layout, its widths."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mcibi_fast.compat.zoo import Context, Layout, Method
from mcibi_fast.models import released_backbones as backbones

StateDict = Mapping[str, Tensor]

WITHIN_IMAGE = "context_within_image_module"
OUTPUT_STRIDE = 8  # of the published ResNets, but for two frameworks
MEMORY = "memory_module.memory"
_PYRAMID = "fpn_convs.0.0.weight"
_IMAGE_LEVEL = "ilc_net.correlate_net.value_project.0.weight"


def shape(state: StateDict, key: str, dims: int = 1) -> torch.Size:
    """An entry's shape, which must have at least so many dimensions."""
    if key not in state:
        kinds = sorted({k.split(".")[0] for k in state}) or ["none"]
        shown = ", ".join(kinds[:12]) + (f" and {len(kinds) - 12} more" if len(kinds) > 12 else "")
        raise ValueError(
            f"checkpoint: key {key} is missing, so this is not an MCIBI++ checkpoint of "
            "sssegmentation, nor one of another method that is known (its keys begin with: "
            f"{shown})"
        )
    size = state[key].shape
    if len(size) < dims:
        raise ValueError(f"checkpoint: {key} has shape {tuple(size)}, expected {dims} dimensions")
    return size


def method_of(state: StateDict) -> Method:
    """Whose head the checkpoint has: MCIBI++'s memory is (K, 2), MCIBI's (K, n, Z)."""
    if MEMORY not in state and _IMAGE_LEVEL in state:
        return "isnet"
    return "mcibi" if len(shape(state, MEMORY)) == 3 else "mcibiplusplus"


def layout_of(state: StateDict) -> Layout:
    """What a checkpoint shows of itself. Raises ValueError for one of another method."""
    method = method_of(state)
    Z = shape(state, "bottleneck.0.weight", 2)[0]
    backbone, published_widths = _backbone(state)
    return Layout(
        method,
        backbone,
        classes_of(state),
        context_of(state),
        pyramid=shape(state, _PYRAMID)[0] / max(Z, 1) if _PYRAMID in state else 0,
        extra_attention="self_attention.value_project.0.weight" in state,
        kernel_sizes=kernel_sizes(state),
        downsample="memory_module.downsample_before_sa.0.weight" in state
        or "downsample_backbone.0.weight" in state,
        shortcut="shortcut.0.weight" in state,
        other_widths=Z != 512 or not published_widths,
    )


def classes_of(state: StateDict) -> int:
    """K."""
    memory = MEMORY in state
    return shape(state, MEMORY)[0] if memory else shape(state, "decoder_stage1.4.weight")[0]


def context_of(state: StateDict) -> Context:
    """The context within the image, of MCIBI++ and MCIBI."""
    names = {key.split(".")[1] for key in state if key.startswith(f"{WITHIN_IMAGE}.")}
    if not names:
        return "none"
    return "ppm" if "branches" in names else "aspp"


def branches_of(state: StateDict) -> int:
    """The number of pooled maps of a PPM."""
    prefix = f"{WITHIN_IMAGE}.branches."
    return len({key.split(".")[2] for key in state if key.startswith(prefix)})


def kernel_sizes(state: StateDict) -> tuple[int, int, int]:
    """Kernel sizes of the classifiers' first convolutions; 1 for a classifier that is absent."""
    pr, cwi, cls = (
        shape(state, name, 3)[2] if name in state else 1
        for name in (f"decoder_{each}.conv1.weight" for each in ("pr", "cwi", "cls"))
    )
    return pr, cwi, cls


def laterals(state: StateDict) -> list[torch.Size]:
    """Shapes of the feature pyramid's lateral convolutions; empty without a pyramid."""
    count = len({key.split(".")[1] for key in state if key.startswith("lateral_convs.")})
    return [shape(state, f"lateral_convs.{i}.0.weight", 2) for i in range(count)]


def auxiliary_widths(state: StateDict) -> list[int]:
    """Channels of the maps that the auxiliary heads take; empty without such heads."""
    one = "auxiliary_decoder.0.weight"
    if one in state:
        return [shape(state, one, 2)[1]]
    pattern = re.compile(r"auxiliary_decoder\.\d+\.0\.weight")
    names = [key for key in state if pattern.fullmatch(key)]
    return [shape(state, f"auxiliary_decoder.{i}.0.weight", 2)[1] for i in range(len(names))]


def _backbone(state: StateDict) -> tuple[str, bool]:
    """A published backbone's name, or "", and whether its widths are the published ones, too."""
    try:
        described = backbones.describe(state) or ""
    except ValueError:  # none of ours, as building it will say
        return "", False
    kind, _, text = described.removeprefix(backbones.PREFIX).partition(" ")
    sizes = json.loads(text or "{}")
    for name, (family, structure, widths) in _BACKBONES.items():
        if kind == family and structure == {key: sizes.get(key) for key in structure}:
            return name, widths == {key: sizes.get(key) for key in widths}
    return "", False


_RESNET = {"channels": [64, 128, 256, 512], "stem_width": 32}
_HRNET_W48 = {
    "num_modules": 3,
    "num_branches": 4,
    "block_type": "BASIC",
    "num_blocks": [4] * 4,
    "num_channels": [48, 96, 192, 384],
    "fuse_method": "SUM",
}
# For each published backbone: its family, its structure and its widths.
_BACKBONES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "resnet50os8": ("resnet", {"bottleneck": True, "depths": [3, 4, 6, 3]}, _RESNET),
    "resnet101os8": ("resnet", {"bottleneck": True, "depths": [3, 4, 23, 3]}, _RESNET),
    "resnest101os8": ("resnest", {"depths": [3, 4, 23, 3]}, _RESNET | {"stem_width": 64}),
    "hrnetv2w48": ("hrnet", {}, {"stem_width": 64, "stage4": _HRNET_W48}),
    "swinlarge": ("swin", {}, {"width": 192, "depths": [2, 2, 18, 2], "window_size": 12}),
    "vitlarge": ("vit", {"norms": True}, {"width": 1024, "side": 32}),
}
