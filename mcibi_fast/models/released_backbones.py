"""Backbones of the released checkpoints: ResNet-v1c, ResNeSt, HRNet, Swin and ViT.

Everything is inferred from the checkpoint's keys and shapes, except the output stride of ResNet and
ResNeSt, the ReLU in HRNet's stem, and what ViT-L is known to have: heads of 64 channels, and maps
from blocks 10, 15, 20 and 24. A backbone's name contains what was inferred, so that the model of a
converted checkpoint can be built from the name alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.layers import AvgPool2dSame
from timm.models import FeatureListNet
from timm.models.hrnet import HighResolutionNetFeatures
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from mcibi_fast.limits import check_limit
from mcibi_fast.models.backbone_wrappers import Backbone, HighResolutionBackbone
from mcibi_fast.models.outline import Unbuildable
from mcibi_fast.models.released_swin import Swin
from mcibi_fast.models.released_vit import ViT, positions_side

StateDict = Mapping[str, Tensor]

PREFIX = "released_"  # the names that create() takes begin with it
_PREFIX = "backbone_net."


def build(state: StateDict, output_stride: int, *, stem_relu: bool = False) -> Backbone | None:
    """The backbone that a checkpoint's ``backbone_net.*`` entries belong to, with fresh weights.

    Args:
        state: the checkpoint's entries; only their names and shapes are read.
        output_stride: stride of a ResNet or ResNeSt (8 in the published checkpoints). An HRNet
            always has 4, or 8 if it is halved, a Swin 32, a ViT 16.
        stem_relu: whether the first batch norm of an HRNet is followed by a ReLU.

    Returns:
        The backbone, or None if it is unknown.
    """
    name = describe(state, stem_relu=stem_relu)
    return None if name is None else _create(name, output_stride)


def describe(state: StateDict, *, stem_relu: bool = False) -> str | None:
    """The name from which :func:`create` builds the checkpoint's backbone; None if unknown.

    Args:
        state: the checkpoint's entries; only their names and shapes are read.
        stem_relu: see :func:`build`.

    Raises:
        ValueError: an entry is missing.
    """
    further = {what: True for what, mark in _NECKS.items() if mark in state}
    shapes = {
        name.removeprefix(_PREFIX): tuple(value.shape)
        for name, value in state.items()
        if name.startswith(_PREFIX)
    }
    for kind, (mark, describe_kind, _) in _KINDS.items():
        if mark in shapes and (kind != "swin" or _count(shapes, "stages")):
            try:
                sizes = describe_kind(shapes) | further
                if kind == "hrnet" and stem_relu:  # names of older checkpoints have no such entry
                    sizes["stem_relu"] = True
                return f"{PREFIX}{kind} {json.dumps(sizes)}"
            except KeyError as error:
                raise ValueError(
                    f"checkpoint: key {_PREFIX}{error.args[0]} is missing; every {kind} has it"
                ) from error
            except (ValueError, IndexError, ZeroDivisionError) as error:
                raise ValueError(
                    f"checkpoint: its entries {_PREFIX}* have shapes that no {kind} has ({error})"
                ) from error
    return None


def create(name: str, *, output_stride: int = 8) -> Backbone:
    """A released backbone with fresh weights.

    Args:
        name: a name from :func:`describe` with the family and its sizes, for example
            ``released_swin {"width": 192, ...}``.
        output_stride: stride of a ResNet or ResNeSt; an HRNet always has 4, or 8 if it is halved,
            a Swin 32, a ViT 16.

    Raises:
        ValueError: there is no such family, or it cannot have these sizes or this stride.
    """
    try:
        backbone = _create(name, output_stride)
    except Unbuildable:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"backbone: {name!r} is not the name of a released backbone") from error
    own = backbone.reductions[-1]
    if own != output_stride:
        raise ValueError(f"backbone: {name.split()[0]} can only have output_stride={own}")
    return backbone


def _create(name: str, output_stride: int) -> Backbone:
    kind, _, text = name.removeprefix(PREFIX).partition(" ")
    sizes = json.loads(text)
    neck = {what: sizes.pop(what, False) for what in _NECKS}
    backbone = _KINDS[kind][2](output_stride=output_stride, **sizes)
    if any(neck.values()):
        backbone.add_neck(**neck)
    return backbone


def has_stem_relu(backbone: nn.Module) -> bool:
    """Whether this is an HRNet with a ReLU after its stem's first batch norm."""
    return isinstance(backbone, HighResolutionBackbone) and not isinstance(
        backbone.body.act1, nn.Identity
    )


def released_name(name: str, backbone: nn.Module) -> str:
    """Translates a name in a :class:`Segmentor`'s state dict into the checkpoint's name.

    Args:
        name: a name that begins with ``backbone.``; other names are returned as they are.
        backbone: the result of :func:`build`.
    """
    if isinstance(backbone, Backbone) and isinstance(backbone.body, FeatureListNet):  # a ResNet
        name = re.sub(r"^backbone\.body\.conv1\.", f"{_PREFIX}stem.", name)
        name = re.sub(r"^backbone\.body\.bn1\.", f"{_PREFIX}stem.7.", name)
    if isinstance(backbone, Backbone) and isinstance(backbone.body, ViT):
        for own, released in _VIT_NAMES.items():
            name = re.sub(rf"^(backbone\.body\.layers\.\d+\.){own}", rf"\1{released}", name)
    name = re.sub(r"^backbone\.neck\.norms\.", "norm_layers.", name)
    name = re.sub(r"^backbone\.neck\.halve\.", "downsample_backbone.", name)
    return re.sub(r"^backbone\.body\.", _PREFIX, name)


# What comes between backbone and head, and an entry that every checkpoint with it has.
_NECKS = {"norms": "norm_layers.0.weight", "halve": "downsample_backbone.0.weight"}

_VIT_NAMES = {
    r"attn\.qkv\.": "attn.attn.in_proj_",
    r"attn\.proj\.": "attn.attn.out_proj.",
    r"ffn\.0\.": "ffn.layers.0.0.",
    r"ffn\.2\.": "ffn.layers.1.",
}

Shapes = Mapping[str, tuple[int, ...]]


def _count(shapes: Shapes, prefix: str) -> int:
    """How many consecutive children ``prefix.0``, ``prefix.1``, ... there are."""
    return len(
        {name[len(prefix) + 1 :].split(".")[0] for name in shapes if name.startswith(f"{prefix}.")}
    )


_LAYERS = [f"layer{i}" for i in (1, 2, 3, 4)]


def _describe_resnet(shapes: Shapes) -> dict[str, Any]:
    return {
        "bottleneck": "layer1.0.conv3.weight" in shapes,
        "stem_width": shapes["stem.0.weight"][0],
        "depths": [_count(shapes, layer) for layer in _LAYERS],
        "channels": [shapes[f"{layer}.0.conv1.weight"][0] for layer in _LAYERS],
    }


def _resnet(
    *,
    bottleneck: bool,
    stem_width: int,
    depths: Sequence[int],
    channels: Sequence[int],
    output_stride: int,
) -> Backbone:
    """ResNet-v1c: a stem of three 3x3 convolutions."""
    block: Any = Bottleneck if bottleneck else BasicBlock
    resnet = ResNet(
        block,
        tuple(depths),
        output_stride=output_stride,
        stem_type="deep",
        stem_width=stem_width,
        channels=tuple(channels),
    )
    for module in resnet.modules():
        if isinstance(module, BasicBlock):  # timm also dilates the second convolution
            module.conv2.dilation = module.conv2.padding = (1, 1)
    return Backbone(FeatureListNet(resnet, out_indices=(1, 2, 3, 4)))


def _describe_resnest(shapes: Shapes) -> dict[str, Any]:
    sizes = _describe_resnet(shapes)
    del sizes["bottleneck"]
    radix = shapes["layer1.0.conv2.conv.weight"][0] // shapes["layer1.0.conv3.weight"][1]
    return {"radix": radix, **sizes}


def _resnest(
    *,
    radix: int,
    stem_width: int,
    depths: Sequence[int],
    channels: Sequence[int],
    output_stride: int,
) -> Backbone:
    resnet = ResNet(
        ResNestBottleneck,  # type: ignore[arg-type]
        tuple(depths),
        output_stride=output_stride,
        stem_type="deep",
        stem_width=stem_width,
        avg_down=True,
        channels=tuple(channels),
        block_args={"radix": radix, "avd": True, "avd_first": False},
    )
    for name, module in list(resnet.named_modules()):
        # If dilation replaces a stride, timm still averages, over 2x2 positions; the released code
        # does not.
        if isinstance(module, AvgPool2dSame):
            resnet.get_submodule(name.rpartition(".")[0])[0] = nn.Identity()  # type: ignore[operator]
    return Backbone(FeatureListNet(resnet, out_indices=(1, 2, 3, 4)))


def _describe_hrnet(shapes: Shapes) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "stem_width": shapes["conv1.weight"][0],
        "stage1": _hrnet_stage(shapes, ["layer1"], modules=1),
    }
    for branches in (2, 3, 4):
        stage = f"stage{branches}"
        sizes[stage] = _hrnet_stage(
            shapes,
            [f"{stage}.0.branches.{i}" for i in range(branches)],
            modules=_count(shapes, stage),
        )
    return sizes


def _hrnet(*, output_stride: int, stem_relu: bool = False, **sizes: Any) -> Backbone:
    body: Any = HighResolutionNetFeatures(sizes, feature_location="", out_indices=(1, 2, 3, 4))
    if not stem_relu:
        body.act1 = nn.Identity()
    return HighResolutionBackbone(body, mode="bilinear")


def _hrnet_stage(shapes: Shapes, branches: list[str], *, modules: int) -> dict[str, Any]:
    bottleneck = f"{branches[0]}.0.conv3.weight" in shapes
    return {
        "num_modules": modules,
        "num_branches": len(branches),
        "block_type": "BOTTLENECK" if bottleneck else "BASIC",
        "num_blocks": [_count(shapes, branch) for branch in branches],
        "num_channels": [shapes[f"{branch}.0.conv1.weight"][0] for branch in branches],
        "fuse_method": "SUM",
    }


def _describe_swin(shapes: Shapes) -> dict[str, Any]:
    width, _, patch_size, _ = shapes["patch_embed.projection.weight"]
    count = _count(shapes, "stages")
    check_limit("MAX_STAGES", count, f"{count} stages")  # all entries are searched for each stage
    stages = [f"stages.{i}.blocks" for i in range(count)]
    bias_table = "0.attn.w_msa.relative_position_bias_table"
    span = round(shapes[f"{stages[0]}.{bias_table}"][0] ** 0.5)  # 2 M - 1 for a window of M x M
    return {
        "width": width,
        "depths": [_count(shapes, stage) for stage in stages],
        "heads": [shapes[f"{stage}.{bias_table}"][1] for stage in stages],
        "window_size": (span + 1) // 2,
        "mlp_ratio": shapes[f"{stages[0]}.0.ffn.layers.0.0.weight"][0] // width,
        "patch_size": patch_size,
    }


def _swin(*, output_stride: int, **sizes: Any) -> Backbone:
    return Backbone(Swin(**sizes))


def _describe_vit(shapes: Shapes) -> dict[str, Any]:
    width, _, patch_size, _ = shapes["patch_embed.projection.weight"]
    depth = _count(shapes, "layers")
    if depth != 24:  # it is not known which blocks' maps another one would return
        raise ValueError(f"{depth} blocks, expected 24")
    return {
        "width": width,
        "depth": depth,
        "heads": max(width // 64, 1),
        "side": positions_side(shapes["pos_embed"][1]),
        "mlp_ratio": shapes["layers.0.ffn.layers.0.0.weight"][0] // width,
        "patch_size": patch_size,
    }


def _vit(*, output_stride: int, **sizes: Any) -> Backbone:
    return Backbone(ViT(**sizes))


# For each family: an entry by which it is recognised (in this order: a ViT also has the entry of
# a Swin, a ResNeSt that of a ResNet), the function that reads its sizes, and the one that builds it
# from them.
_KINDS: dict[str, tuple[str, Callable[[Shapes], dict[str, Any]], Callable[..., Backbone]]] = {
    "vit": ("layers.0.attn.attn.in_proj_weight", _describe_vit, _vit),
    "swin": ("patch_embed.projection.weight", _describe_swin, _swin),
    "hrnet": ("stage2.0.branches.0.0.conv1.weight", _describe_hrnet, _hrnet),
    "resnest": ("layer1.0.conv2.fc1.weight", _describe_resnest, _resnest),
    "resnet": ("layer1.0.conv1.weight", _describe_resnet, _resnet),
}
