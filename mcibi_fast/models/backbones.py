"""Backbones: any timm model that gives feature maps, at a chosen output stride.

timm is imported inside the functions because it takes seconds, and neither ``--help`` nor a head on
a backbone from elsewhere needs it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from mcibi_fast.errors import WeightsError
from mcibi_fast.models.backbone_wrappers import Backbone, HighResolutionBackbone
from mcibi_fast.models.pretrained import find_pretrained, readable

Pretrained = bool | str | os.PathLike[str]

# For each of timm's modules: the options with which its models accept images of any size and give
# the maps that are needed here.
_FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    # Without always_partition, a stage that is a single window at the pretraining size never shifts
    # its windows.
    "swin_transformer": {"strict_img_size": False, "always_partition": True},
    "swin_transformer_v2": {"strict_img_size": False, "always_partition": True},
    "vision_transformer": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "deit": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "eva": {"dynamic_img_size": True, "dynamic_img_pad": True},
    # The branches themselves, not the maps of 128 to 1024 channels computed for classification.
    "hrnet": {"feature_location": "", "out_indices": (1, 2, 3, 4)},
}


def create_backbone(
    name: str, *, output_stride: int = 8, pretrained: Pretrained = False
) -> Backbone:
    """A timm model's stages as feature maps.

    HRNet (stride 4) gives its concatenated branches, see :class:`HighResolutionBackbone`. Models
    with a single scale, such as ViT (stride 16), give the maps of four evenly spaced blocks, all at
    that stride. The other families give their last four stages.

    Args:
        name: name of the timm model, or of a converted checkpoint's backbone
            (:func:`mcibi_fast.models.released_backbones.create`).
        output_stride: stride of the last map; 8 dilates the last two stages instead of striding.
        pretrained: True loads the weights that timm lists for the model, from its cache or the
            network; a path loads that file (timm's own formats, safetensors or a state dict); a
            name such as "efficientnet_lite0" loads that of an installed package, see
            :data:`mcibi_fast.models.pretrained.PACKAGED`.

    Raises:
        ValueError: timm has no such model, or it has no feature maps at this stride.
        WeightsError: the weights could not be loaded; the message says which and what to do.
    """
    import timm

    if name.startswith("released_"):
        from mcibi_fast.models import released_backbones as released

        if pretrained is not False:
            raise WeightsError(
                "pretrained: a released backbone's weights are in its checkpoint; pass that"
            )
        return released.create(name, output_stride=output_stride)
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"backbone: timm has no model {name!r} (similar: {similar})")
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    body, options = _feature_extractor(name, family, output_stride)
    if pretrained is not False:
        body = _with_weights(body, name, pretrained, options)
    if family == "hrnet":
        return HighResolutionBackbone(body)
    # Swin asserts that its first stride divides the image.
    pad_to = body.feature_info.reduction()[0] if family.startswith("swin_transformer") else 1
    return Backbone(body, pad_to=pad_to)


def set_drop_path(backbone: nn.Module, rate: float) -> None:
    """Sets the rate of stochastic depth (Huang et al., 2016) of a backbone that has it, as Swin.

    The last block gets ``rate``; the rates of the blocks before it are scaled in proportion.

    Raises:
        ValueError: the backbone has no stochastic depth, or the rate is below 0 or not below 1.
    """
    from timm.layers import DropPath

    paths = [module for module in backbone.modules() if isinstance(module, DropPath)]
    last = max((path.drop_prob or 0.0 for path in paths), default=0.0)
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path: {rate}, expected 0 or more and less than 1")
    if not last:
        raise ValueError("drop_path: the backbone has no stochastic depth")
    for path in paths:
        path.drop_prob = (path.drop_prob or 0.0) * rate / last


def _feature_extractor(name: str, family: str, output_stride: int) -> tuple[Any, dict[str, Any]]:
    """The model with fresh weights, and the options that it was created with."""
    import timm

    own_options = {"features_only": True, **_FAMILY_OPTIONS.get(family, {})}
    options = {**own_options, "output_stride": output_stride}
    refusals = (TypeError, AssertionError, NotImplementedError, RuntimeError)
    try:
        body: Any = timm.create_model(name, **options)
    except refusals:
        # Some models take no output_stride; they can be used if theirs is the requested one.
        options = own_options
        body = _without_stride(name, options, refusals)
    own = _stride(body, family)  # some releases of timm let Swin ignore the stride
    if own != output_stride:
        raise ValueError(
            f"backbone: {name} cannot run at output stride {output_stride}; pass "
            f"output_stride={own}, its own, or choose a model that can (resnet50, convnext_tiny)"
        )
    strides = {stage["reduction"] for stage in body.feature_info.info}
    depth = len(body.feature_info.info)
    if len(strides) == 1 and depth > 4:  # a single scale: by default timm gives the last 3 blocks
        options["out_indices"] = tuple(depth * (i + 1) // 4 - 1 for i in range(4))
        body = timm.create_model(name, **options)
    return body, options


def _stride(body: Any, family: str) -> int:
    reductions = body.feature_info.reduction()
    return reductions[0] if family == "hrnet" else reductions[-1]


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
        source = str(find_pretrained(str(pretrained)))
    elif not source:
        raise WeightsError(f"pretrained: timm has no weights for {name}; pass the path of a file")
    # Feature maps need no classifier, and timm warns about the file's. (It also warns about missing
    # entries, which is left.)
    builder = logging.getLogger("timm.models._builder")
    builder.addFilter(_is_no_note_on_more_entries)
    try:
        if pretrained is True:
            return timm.create_model(name, pretrained=True, **options)
        with readable(name, Path(source)) as file:
            # Some of timm's configurations expect .npz files, others only state dicts.
            overlay = {"file": str(file), "custom_load": file.suffix == ".npz"}
            return timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, **options
            )
    except Exception as error:  # the hub, the network and the file raise errors of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"pretrained: could not load {source} for {name} ({reason}). Download it on a machine "
            "with a network and pass its path as pretrained=PATH, or train with pretrained=False"
        ) from error
    finally:
        builder.removeFilter(_is_no_note_on_more_entries)


def _is_no_note_on_more_entries(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Unexpected keys")
