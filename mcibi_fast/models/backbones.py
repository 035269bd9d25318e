"""Backbones: any timm model that gives feature maps, at a chosen output stride.

timm is imported where it is used: it takes seconds, which ``--help`` and heads on a backbone of
one's own can do without.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Pretrained = bool | str | os.PathLike[str]


class Backbone(nn.Module):
    """A timm feature extractor: images (B, 3, H, W) -> at most four maps, finest first.

    Attributes:
        channels: of each map.
        reductions: stride of each map.
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.channels: list[int] = body.feature_info.channels()[-4:]
        self.reductions: list[int] = body.feature_info.reduction()[-4:]
        # Transformers with windows keep their channels last; "NHWC" is timm's word for it.
        self.nhwc = str(getattr(body, "output_fmt", "")).endswith("NHWC")

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body(images)[-len(self.channels) :]
        return [m.permute(0, 3, 1, 2) for m in maps] if self.nhwc else list(maps)


def create_backbone(
    name: str, *, output_stride: int = 8, pretrained: Pretrained = False
) -> Backbone:
    """A timm model's stages as feature maps.

    Args:
        name: of the timm model.
        output_stride: of the last map; 8 dilates the last two stages instead of striding.
        pretrained: True loads the weights that timm names, from its cache or the network; a path
            loads that file (timm's own formats, safetensors or a state dict).

    Raises:
        ValueError: timm has no such model, or it has no feature maps at this stride.
        RuntimeError: the weights could not be had; the message says which and what to do.
    """
    body, options = _feature_extractor(name, output_stride)
    if pretrained is not False:
        body = _with_weights(body, name, pretrained, options)
    return Backbone(body)


def _feature_extractor(name: str, output_stride: int) -> tuple[Any, dict[str, Any]]:
    """The model without weights, and the options that made it."""
    import timm

    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"backbone: timm has no model {name!r} (similar: {similar})")
    options: dict[str, Any] = {"features_only": True, "output_stride": output_stride}
    refusals = (TypeError, AssertionError, NotImplementedError, RuntimeError)
    try:
        body: Any = timm.create_model(name, **options)
    except refusals:
        # Some models take no output_stride; their own will do if it is the one asked for.
        options = {"features_only": True}
        body = _without_stride(name, options, refusals)
    own = body.feature_info.reduction()[-1]  # some releases of timm let Swin ignore the stride
    if own != output_stride:
        raise ValueError(
            f"backbone: {name} cannot run at output stride {output_stride}; pass "
            f"output_stride={own}, its own, or choose a model that can (resnet50, convnext_tiny)"
        )
    return body, options


def _without_stride(
    name: str, options: dict[str, Any], refusals: tuple[type[Exception], ...]
) -> Any:
    import timm

    try:
        return timm.create_model(name, **options)
    except refusals as error:
        raise ValueError(
            f"backbone: {name} gives no feature maps in timm (features_only: {error}); choose a "
            "convolutional model such as resnet50, or a hierarchical transformer"
        ) from error


def _with_weights(body: Any, name: str, pretrained: Pretrained, options: dict[str, Any]) -> Any:
    import timm

    config: dict[str, Any] = body.pretrained_cfg
    source = config.get("hf_hub_id") or config.get("url")
    if pretrained is not True:
        source = str(pretrained)
        if not Path(source).is_file():
            raise RuntimeError(f"pretrained: there is no file {source} with weights for {name}")
        options = {**options, "pretrained_cfg_overlay": {"file": source}}
    elif not source:
        raise RuntimeError(f"pretrained: timm has no weights for {name}; give a file of your own")
    try:
        if pretrained is not True:
            _check_entries(name, source)
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub, the network and the file each have their own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(
            f"pretrained: could not load {source} for {name} ({reason}). Download it where there "
            "is a network and pass its path as pretrained=PATH, or train with pretrained=False"
        ) from error


def _check_entries(name: str, file: str) -> None:
    """timm skips unknown entries without a word, all of them if need be."""
    import timm
    from timm.models import load_state_dict

    with torch.device("meta"):
        known = timm.create_model(name).state_dict()
    if not known.keys() & load_state_dict(file).keys():
        raise ValueError(f"none of the file's entries is one of {name}'s")
