"""Converts a model loaded from a released checkpoint into one that `mcibi_fast.models` creates."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from mcibi_fast.data import IMAGENET_MEAN, IMAGENET_STD
from mcibi_fast.models import MCIBIPPHead, Segmentor, UperNet
from mcibi_fast.models import released_backbones as backbones
from mcibi_fast.models.backbone_wrappers import Backbone
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec
from mcibi_fast.nn.within_image import PPM

# timm's names of the released ResNet-v1c; the other backbones get names from `released_backbones`.
_RESNETS = ("resnet50c", "resnet101c", "resnet152c")


def convert(
    loaded: Segmentor, classes: list[str], palette: list[list[int]]
) -> tuple[Segmentor, ModelSpec]:
    """The model as `mcibi_fast.models.create` makes it, and its specification.

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
    own = backbones.describe(entries) or ""
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
    if not isinstance(head, MCIBIPPHead):
        raise NotImplementedError(f"its head is a {type(head).__name__}")
    if isinstance(head, UperNet):
        return "upernet_mcibipp"
    if head.within_image is None:
        return "fcn_mcibipp"
    return "pspnet_mcibipp" if isinstance(head.within_image, PPM) else "deeplabv3_mcibipp"


def _options(loaded: Segmentor) -> dict[str, Any]:
    """The model's arguments, as far as they vary in the released code."""
    head, backbone = loaded.head, cast(Backbone, loaded.backbone)
    context = head.context
    decoders = (context.weight_head, head.within_image_head, head.decoder)
    options: dict[str, Any] = {
        "form": "released",
        "output_stride": backbone.reductions[-1],
        "feats_channels": head.memory.channels,
        "transform_channels": context.attention.transform_channels,
        "kernel_sizes": [1 if d is None else d.conv[0].kernel_size[0] for d in decoders],
        "weights_from": head.weights_from,
        "extra_attention": head.extra_attention is not None,
        "downsample": context.downsample is not None,
        "auxiliary_weight": head.auxiliary_weight,
    }
    if isinstance(head, UperNet):
        options["context"] = "ppm" if isinstance(head.within_image, PPM) else "aspp"
        options["memory_joins"] = head.memory_joins
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
