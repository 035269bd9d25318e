"""Backbones of the released checkpoints that are no plain ResNet: ResNeSt, HRNet and Swin.

All is inferred from keys and shapes, except the output stride of ResNeSt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from timm.layers import AvgPool2dSame
from timm.models import FeatureListNet
from timm.models.hrnet import HighResolutionNetFeatures
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import ResNet
from torch import Tensor, nn

from mcibi_fast.compat.swin import Swin
from mcibi_fast.models.backbones import Backbone, HighResolutionBackbone

StateDict = Mapping[str, Tensor]

_PREFIX = "backbone_net."


def build(state: StateDict, output_stride: int) -> Backbone | None:
    """The backbone that a checkpoint's ``backbone_net.*`` entries belong to, with fresh weights.

    Args:
        state: the checkpoint's entries; only their names and shapes are read.
        output_stride: of ResNeSt: 8 for the published ones. HRNet has 4, Swin 32.

    Returns:
        None for a plain ResNet or anything unknown.
    """
    shapes = {
        name.removeprefix(_PREFIX): tuple(value.shape)
        for name, value in state.items()
        if name.startswith(_PREFIX)
    }
    if "patch_embed.projection.weight" in shapes:
        return _swin(shapes)
    if "stage2.0.branches.0.0.conv1.weight" in shapes:
        return _hrnet(shapes)
    if "layer1.0.conv2.fc1.weight" in shapes:
        return _resnest(shapes, output_stride)
    return None


def released_name(name: str, backbone: nn.Module) -> str:
    """A name in a :class:`Segmentor`'s state dict -> the checkpoint's.

    Args:
        name: beginning with ``backbone.``; others are returned as they are.
        backbone: from :func:`build`.
    """
    if isinstance(backbone, Backbone) and isinstance(backbone.body, FeatureListNet):  # a ResNet
        name = re.sub(r"^backbone\.body\.conv1\.", f"{_PREFIX}stem.", name)
        name = re.sub(r"^backbone\.body\.bn1\.", f"{_PREFIX}stem.7.", name)
    return re.sub(r"^backbone\.body\.", _PREFIX, name)


Shapes = Mapping[str, tuple[int, ...]]


def _count(shapes: Shapes, prefix: str) -> int:
    """How many consecutive children ``prefix.0``, ``prefix.1``, ... there are."""
    return len(
        {name[len(prefix) + 1 :].split(".")[0] for name in shapes if name.startswith(f"{prefix}.")}
    )


def _resnest(shapes: Shapes, output_stride: int) -> Backbone:
    layers = [f"layer{i}" for i in (1, 2, 3, 4)]
    radix = shapes["layer1.0.conv2.conv.weight"][0] // shapes["layer1.0.conv3.weight"][1]
    resnet = ResNet(
        ResNestBottleneck,  # type: ignore[arg-type]
        tuple(_count(shapes, layer) for layer in layers),
        output_stride=output_stride,
        stem_type="deep",
        stem_width=shapes["stem.0.weight"][0],
        avg_down=True,
        channels=tuple(shapes[f"{layer}.0.conv1.weight"][0] for layer in layers),
        block_args={"radix": radix, "avd": True, "avd_first": False},
    )
    for name, module in list(resnet.named_modules()):
        # Where dilation takes a stride's place timm averages all the same, over 2x2 positions.
        if isinstance(module, AvgPool2dSame):
            resnet.get_submodule(name.rpartition(".")[0])[0] = nn.Identity()  # type: ignore[operator]
    return Backbone(FeatureListNet(resnet, out_indices=(1, 2, 3, 4)))


def _hrnet(shapes: Shapes) -> Backbone:
    config: dict[str, Any] = {
        "stem_width": shapes["conv1.weight"][0],
        "stage1": _hrnet_stage(shapes, ["layer1"], modules=1),
    }
    for branches in (2, 3, 4):
        stage = f"stage{branches}"
        config[stage] = _hrnet_stage(
            shapes,
            [f"{stage}.0.branches.{i}" for i in range(branches)],
            modules=_count(shapes, stage),
        )
    body: Any = HighResolutionNetFeatures(config, feature_location="", out_indices=(1, 2, 3, 4))
    body.act1 = nn.Identity()  # the released stem has no ReLU between its two convolutions
    return HighResolutionBackbone(body, mode="bilinear")


def _hrnet_stage(shapes: Shapes, branches: list[str], *, modules: int) -> dict[str, Any]:
    bottleneck = f"{branches[0]}.0.conv3.weight" in shapes
    return {
        "num_modules": modules,
        "num_branches": len(branches),
        "block_type": "BOTTLENECK" if bottleneck else "BASIC",
        "num_blocks": tuple(_count(shapes, branch) for branch in branches),
        "num_channels": tuple(shapes[f"{branch}.0.conv1.weight"][0] for branch in branches),
        "fuse_method": "SUM",
    }


def _swin(shapes: Shapes) -> Backbone:
    width, _, patch_size, _ = shapes["patch_embed.projection.weight"]
    stages = [f"stages.{i}.blocks" for i in range(_count(shapes, "stages"))]
    bias_table = "0.attn.w_msa.relative_position_bias_table"
    span = round(shapes[f"{stages[0]}.{bias_table}"][0] ** 0.5)  # 2 M - 1 for a window of M x M
    return Backbone(
        Swin(
            width,
            [_count(shapes, stage) for stage in stages],
            [shapes[f"{stage}.{bias_table}"][1] for stage in stages],
            (span + 1) // 2,
            mlp_ratio=shapes[f"{stages[0]}.0.ffn.layers.0.0.weight"][0] // width,
            patch_size=patch_size,
        )
    )
