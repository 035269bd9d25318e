"""Converts a model loaded from a released checkpoint into one that `mcibi_fast.models` creates."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from mcibi_fast.compat import peers
from mcibi_fast.data import IMAGENET_MEAN, IMAGENET_STD
from mcibi_fast.models import SETR, ISNet, MCIBIHead, MCIBIPPHead, Segmentor, UperNet, head_type
from mcibi_fast.models import released_backbones as backbones
from mcibi_fast.models.backbone_wrappers import Backbone
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.memory_head import MemoryHead
from mcibi_fast.models.weights import ModelSpec
from mcibi_fast.nn.blocks import negative_slope
from mcibi_fast.nn.representation_memory import RepresentationMemory
from mcibi_fast.nn.within_image import ASPP, PPM

# timm's names of the released ResNet-v1c; the other backbones get names from `released_backbones`.
_RESNETS = ("resnet50c", "resnet101c", "resnet152c")


def convert(
    loaded: Segmentor, classes: list[str], palette: list[list[int]]
) -> tuple[Segmentor, ModelSpec]:
    """The model as `mcibi_fast.models.create` makes it, and its specification.

    The specification says how the authors tested the checkpoint, if it is a published one.

    Args:
        loaded: the result of `compat.sssegmentation.load`.
        classes, palette: names and colours of the K classes.

    Raises:
        NotImplementedError: `create` cannot make this model (the message says why).
    """
    name, shapes = _framework(loaded.head), _shapes(loaded)
    entries = {
        backbones.released_name(key, loaded.backbone): tensor
        for key, tensor in loaded.state_dict().items()
    }
    own = backbones.describe(entries, stem_relu=backbones.has_stem_relu(loaded.backbone)) or ""
    resnets = _RESNETS if own.startswith("released_resnet ") else ()
    for backbone in (*resnets, own):
        spec = ModelSpec(
            name=name,
            backbone=backbone,
            options=_options(loaded),
            classes=classes,
            palette=palette,
            mean=list(IMAGENET_MEAN),
            std=list(IMAGENET_STD),
            inference=loaded.tested_with,
        )
        try:
            with torch.device("meta"):
                fits = _shapes(create_model(spec)) == shapes
        except ValueError:  # a stride that this backbone cannot have
            continue
        if fits:
            break
    else:
        raise NotImplementedError(f"its layers are not those of {name} on any backbone")
    model = create_model(spec).eval()
    model.load_state_dict(loaded.state_dict())
    if not _same_logits(loaded, model):
        raise NotImplementedError("layers of the same shapes give other logits")
    return model, spec


def _framework(head: nn.Module) -> str:
    """The name with which `create` makes a model with this head."""
    for name, peer in peers.PEERS.items():
        framework = getattr(peer, "FRAMEWORK", name)
        if type(head) is head_type(framework):
            return framework
    if isinstance(head, ISNet):
        return "isnet"
    if not isinstance(head, MCIBIPPHead | MCIBIHead):
        raise NotImplementedError(f"its head is a {type(head).__name__}")
    framework = "fcn"
    if isinstance(head, UperNet):
        framework = "upernet"
    elif head.within_image is not None:
        framework = "pspnet" if isinstance(head.within_image, PPM) else "deeplabv3"
    return f"{framework}_{'mcibi' if isinstance(head, MCIBIHead) else 'mcibipp'}"


def _options(loaded: Segmentor) -> dict[str, Any]:
    """The model's arguments, as far as they vary in the released code."""
    head: Any = loaded.head
    backbone = cast(Backbone, loaded.backbone)
    options: dict[str, Any] = {
        "output_stride": backbone.reductions[-1],
        "auxiliary_weight": head.auxiliary_weight,
    }
    if slope := negative_slope(head):
        options["negative_slope"] = slope
    if head.align_corners:
        options["align_corners"] = True
    if isinstance(head, MemoryHead):
        return options | _memory_options(head)
    if not isinstance(loaded.head, ISNet):
        return options | _peer_options(loaded)
    options["feats_channels"] = head.bottleneck[0].out_channels
    options["transform_channels"] = head.within_image.image_level.attention.transform_channels
    if head.shortcut is not None:
        options["shortcut_channels"] = head.shortcut[0].out_channels
    return options


def _peer_options(loaded: Segmentor) -> dict[str, Any]:
    framework = _form(loaded.head)
    options = peers.PEERS[framework].options(
        {
            peers.released_name(backbones.released_name(name, loaded.backbone), framework): tensor
            for name, tensor in loaded.state_dict().items()
        }
    )
    del options["num_classes"]
    within = [m for m in loaded.head.modules() if isinstance(m, ASPP)]
    if within:
        options["dilations"] = _dilations(within[0])
    return options


def _form(head: Any) -> str:
    """The module of :mod:`mcibi_fast.compat.peers` that describes such a head."""
    if isinstance(head, SETR) and head.levels is None:
        return "setr_pup" if len(head.decoder.blocks) == 4 else "setr_naive"
    return _framework(head)


def _dilations(within: Any) -> list[int]:
    first = (next(m for m in b.modules() if isinstance(m, nn.Conv2d)) for b in within.branches)
    return [conv.dilation[0] for conv in first]


def _memory_options(head: Any) -> dict[str, Any]:
    context, memory, within = head.context, head.memory, head.within_image
    pyramid, kind = getattr(head, "pyramid", None), type(within)
    options: dict[str, Any] = {
        "form": "released",
        "feats_channels": memory.channels,
        "transform_channels": context.attention.transform_channels,
        "weights_from": head.weights_from,
        "downsample": context.downsample is not None,
    }
    if context.hard:
        options["hard"] = True
    if kind is ASPP and pyramid is None:
        options["dilations"] = _dilations(within)
    elif kind is PPM and pyramid is None:
        options["pool_scales"] = [level[0].output_size for level in within.pyramid]
    if isinstance(head.auxiliary, nn.ModuleList):
        options["auxiliary_heads"] = len(head.auxiliary)
    if isinstance(memory, RepresentationMemory):
        return options | {"representations": memory.per_class}
    decoders = (context.weight_head, head.within_image_head, head.decoder)
    options["kernel_sizes"] = [1 if d is None else d.conv[0].kernel_size[0] for d in decoders]
    options["extra_attention"] = head.extra_attention is not None
    if pyramid is not None:
        options["context"] = "ppm" if kind is PPM else "aspp"
        options["memory_joins"] = head.memory_joins
        options["pyramid_channels"] = pyramid.outputs[0][0].out_channels
    return options


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@torch.inference_mode()
def _same_logits(loaded: Segmentor, model: Segmentor) -> bool:
    """Whether both give the same logits for noise; shapes do not show strides and dilations."""
    images = torch.randn(1, 3, 65, 97, generator=torch.Generator().manual_seed(0))
    expected, logits = loaded(images).logits, model(images).logits
    if logits.shape != expected.shape:
        return False
    return torch.allclose(logits, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
