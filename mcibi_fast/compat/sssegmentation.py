"""Loads checkpoints of the authors' released code (sssegmentation) as models of this package.

A checkpoint is ``{"model": state_dict}``. Everything that its keys and shapes show is inferred: the
backbone's depth and widths, channels, classes, the kind of context. What they do not show is an
argument. All released heads are supported: FCN, PPM, ASPP, and UperNet with PPM or ASPP. The
backbones are those of :mod:`mcibi_fast.models.released_backbones`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mcibi_fast.compat.accelerate import accelerate as accelerate
from mcibi_fast.limits import check_limit
from mcibi_fast.models import head_type
from mcibi_fast.models import released_backbones as backbones
from mcibi_fast.models.backbone_wrappers import Backbone
from mcibi_fast.models.mcibipp import MCIBIPPHead
from mcibi_fast.models.memory_head import WeightsFrom
from mcibi_fast.models.outline import Unbuildable, outline
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.nn.within_image import ASPP, PPM
from mcibi_fast.untrusted import check_tensors, read_torch

StateDict = Mapping[str, Tensor]
_Module = TypeVar("_Module", bound=nn.Module)

_WITHIN_IMAGE = "context_within_image_module"

# From this package's names to the checkpoint's; applied in this order.
_RENAMING = [
    (r"^head\.", ""),
    (r"^context\.memory\.", "memory_module."),
    (r"^context\.attention\.(query|key|value)\.", r"memory_module.self_attention.\1_project."),
    (r"^context\.attention\.output\.", "memory_module.self_attention.out_project."),
    (r"^context\.downsample\.", "memory_module.downsample_before_sa."),
    (r"^context\.fuse\.conv\.", "memory_module.bottleneck."),
    (r"^context\.weight_head\.", "decoder_pr."),
    (r"^within_image_head\.", "decoder_cwi."),
    (r"^within_image\.branches\.", "context_within_image_module.parallel_branches."),
    (r"^within_image\.pyramid\.", "context_within_image_module.branches."),
    (r"^within_image\.", "context_within_image_module."),
    (r"^extra_attention\.(query|key|value)\.", r"self_attention.\1_project."),
    (r"^extra_attention\.output\.", "self_attention.out_project."),
    (r"^pyramid\.laterals\.", "lateral_convs."),
    (r"^pyramid\.outputs\.", "fpn_convs."),
    (r"^decoder\.", "decoder_cls."),
    (r"^(decoder_\w+)\.conv\.0\.", r"\1.conv1."),
    (r"^(decoder_\w+)\.conv\.1\.", r"\1.bn1."),
    (r"^(decoder_\w+)\.classifier\.", r"\1.conv2."),
    (r"^auxiliary\.conv\.", "auxiliary_decoder."),
    (r"^auxiliary\.classifier\.", "auxiliary_decoder.4."),
]


def load(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    output_stride: int = 8,
    **options: Any,
) -> Segmentor:
    """Loads a released checkpoint as a model in evaluation mode.

    Args:
        checkpoint: a file, or what ``torch.load`` returns for it: ``{"model": state_dict}``.
        output_stride: output stride of the backbone; 8 for every published ResNet.
        options: see :func:`head`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a checkpoint, or keys are missing, unknown or of another shape
            (the message names them).
    """
    state = _read(checkpoint)

    def build() -> Segmentor:
        return Segmentor(_build_backbone(state, output_stride), _build_head(state, **options))

    def rename(name: str, model: Segmentor) -> str:
        return released_name(backbones.released_name(name, model.backbone))

    return _filled(build, state, rename)


def head(
    state_dict: StateDict,
    *,
    weights_from: WeightsFrom = "auto",
    hard: bool = False,
    dilations: Sequence[int] = (1, 12, 24, 36),
    pool_scales: Sequence[int] = (1, 2, 3, 6),
    dropout: float = 0.1,
    align_corners: bool = False,
    **options: Any,
) -> MCIBIPPHead:
    """Loads only the head of a released checkpoint, in evaluation mode.

    It is called with the backbone's maps: ``forward([f0, f1, f2, f3])``.

    Args:
        state_dict: the checkpoint's entries; those of the backbone are ignored.
        weights_from: whose logits are used as W. "auto" takes the within-image head's if there is
            one; of the published checkpoints only ppm_resnet50os8_ade20k needs "pr".
        hard: gather with one-hot weights.
        dilations: dilations of the ASPP branches.
        pool_scales: scales of the PPM branches.
        dropout: channel dropout if the model is trained further.
        align_corners: whether every resizing aligns corners.
        options: further options of :class:`MCIBIPPHead`, for example ``ignore_index`` (255 here,
            -100 in the released code), ``momentum`` and ``stages``.

    Raises:
        ValueError: as in :func:`load`.
    """
    state = {k: v for k, v in state_dict.items() if not k.startswith("backbone_net.")}

    def build() -> MCIBIPPHead:
        return _build_head(
            state,
            weights_from=weights_from,
            hard=hard,
            dilations=dilations,
            pool_scales=pool_scales,
            dropout=dropout,
            align_corners=align_corners,
            **options,
        )

    return _filled(build, state, lambda name, _: released_name(name))


def _read(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> StateDict:
    if not isinstance(checkpoint, Mapping):
        path = Path(checkpoint)
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint: there is no file {path}")
        try:
            checkpoint = read_torch(path)
        except ValueError as error:
            raise ValueError(f"checkpoint: torch cannot load {path} ({error})") from error
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("model"), Mapping):
        raise ValueError('checkpoint: expected {"model": state_dict}, as the released code saves')
    state = checkpoint["model"]
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"checkpoint: its entry {name!r} is no tensor with a name")
    try:
        check_tensors(state)
    except ValueError as error:
        raise ValueError(f"checkpoint: {error}") from error
    return state


def _build_head(
    state: StateDict,
    *,
    dilations: Sequence[int] = (1, 12, 24, 36),
    pool_scales: Sequence[int] = (1, 2, 3, 6),
    **options: Any,
) -> MCIBIPPHead:
    feats_channels, last_channels = _shape(state, "bottleneck.0.weight", 2)[:2]
    auxiliary = "auxiliary_decoder.0.weight"
    auxiliary_channels = _shape(state, auxiliary, 2)[1] if auxiliary in state else None
    if auxiliary_channels is None:
        options["auxiliary_weight"] = 0.0
    within_image = _build_within_image(
        state,
        dilations=dilations,
        pool_scales=pool_scales,
        align_corners=options.get("align_corners", False),
    )
    widths = [auxiliary_channels or last_channels, last_channels]
    framework: Any = MCIBIPPHead
    laterals = _laterals(state)
    if laterals:
        if within_image is None:
            raise ValueError(
                f"checkpoint: it has a feature pyramid (lateral_convs.*) but no {_WITHIN_IMAGE}.*, "
                "which every UperNet of the released code has"
            )
        framework = head_type("upernet", "mcibipp")
        widths = [*(lateral[1] for lateral in laterals), last_channels]
        # The laterals have the width of the pyramid's top: [memory, context] or the context alone.
        options["memory_joins"] = "after" if laterals[0][0] == feats_channels else "before"
    transform_channels = _shape(state, "memory_module.self_attention.value_project.0.weight")[0]
    return framework(
        _shape(state, "memory_module.memory")[0],
        widths,
        form="released",
        feats_channels=feats_channels,
        transform_channels=transform_channels,
        within_image=within_image,
        extra_attention="self_attention.value_project.0.weight" in state,
        kernel_sizes=_kernel_sizes(state),
        downsample="memory_module.downsample_before_sa.0.weight" in state,
        **options,
    )


def _kernel_sizes(state: StateDict) -> list[int]:
    """Kernel sizes of the classifiers' first convolutions; 1 for a classifier that is absent."""
    names = [f"decoder_{name}.conv1.weight" for name in ("pr", "cwi", "cls")]
    return [_shape(state, name, 3)[2] if name in state else 1 for name in names]


def _laterals(state: StateDict) -> list[torch.Size]:
    """Shapes of the feature pyramid's lateral convolutions; empty without a pyramid."""
    count = len({key.split(".")[1] for key in state if key.startswith("lateral_convs.")})
    return [_shape(state, f"lateral_convs.{i}.0.weight", 2) for i in range(count)]


def _build_within_image(
    state: StateDict, *, dilations: Sequence[int], pool_scales: Sequence[int], align_corners: bool
) -> nn.Module | None:
    if not any(key.startswith(f"{_WITHIN_IMAGE}.") for key in state):
        return None
    channels = _shape(state, "bottleneck.0.weight", 2)
    branches = {k.split(".")[2] for k in state if k.startswith(f"{_WITHIN_IMAGE}.branches.")}
    if not branches:
        return ASPP(channels[1], channels[0], dilations=dilations, align_corners=align_corners)
    if len(branches) != len(pool_scales):
        raise ValueError(
            f"pool_scales: the checkpoint has {len(branches)} branches, got {tuple(pool_scales)}"
        )
    return PPM(channels[1], channels[0], pool_scales=pool_scales, align_corners=align_corners)


def _build_backbone(state: StateDict, output_stride: int) -> Backbone:
    _shape(state, "bottleneck.0.weight")  # raises if this is another kind of checkpoint
    backbone = backbones.build(state, output_stride)
    if backbone is None:
        raise ValueError(
            "checkpoint: its entries backbone_net.* belong to none of ResNet, ResNeSt, HRNet, Swin"
        )
    return backbone


def _shape(state: StateDict, key: str, dims: int = 1) -> torch.Size:
    """An entry's shape, which must have at least so many dimensions."""
    if key not in state:
        kinds = ", ".join(sorted({k.split(".")[0] for k in state})) or "none"
        raise ValueError(
            f"checkpoint: key {key} is missing, so this is not an MCIBI++ checkpoint of "
            f"sssegmentation (its keys begin with: {kinds})"
        )
    shape = state[key].shape
    if len(shape) < dims:
        raise ValueError(f"checkpoint: {key} has shape {tuple(shape)}, expected {dims} dimensions")
    return shape


def released_name(name: str) -> str:
    """Translates a name in the state dict of a head or model (``head.``) to the checkpoint's name.

    For names of a backbone see :func:`mcibi_fast.models.released_backbones.released_name`.
    """
    for pattern, replacement in _RENAMING:
        name = re.sub(pattern, replacement, name)
    return name


def _filled(
    build: Callable[[], _Module], state: StateDict, rename: Callable[[str, _Module], str]
) -> _Module:
    """The model that ``build`` creates, in evaluation mode, with every entry loaded.

    It is first built without memory, so that refusing shapes larger than the file costs nothing.
    """
    check_limit("MAX_TENSORS", len(state), f"checkpoint: it holds {len(state):,} entries")
    try:
        _entries(outline(build, len(state)), state, rename)
    except Unbuildable as error:
        raise ValueError(f"checkpoint: {error}") from error
    model = build()
    model.load_state_dict(_entries(model, state, rename), strict=True)
    return model.eval()


def _entries(
    model: _Module, state: StateDict, rename: Callable[[str, _Module], str]
) -> dict[str, Tensor]:
    """The model's state dict with the checkpoint's values. Raises ValueError if they do not fit."""
    own = model.state_dict()
    names = {rename(name, model): name for name in own}
    target = {rename(name, model): value for name, value in own.items()}
    # No published checkpoint contains batch norm's step counters, which do not affect the results.
    missing = {k for k in target.keys() - state.keys() if not k.endswith("num_batches_tracked")}
    shapes = {
        k: f"{k} {tuple(state[k].shape)} instead of {tuple(target[k].shape)}"
        for k in target.keys() & state.keys()
        if state[k].shape != target[k].shape
    }
    problems = [
        f"{what}: {_some(entries)}"
        for what, entries in (
            ("missing", missing),
            ("unexpected", state.keys() - target.keys()),
            ("of another shape", shapes.values()),
        )
        if entries
    ]
    if problems:
        raise ValueError(f"checkpoint: its keys do not fit the model; {'; '.join(problems)}")
    return {names[k]: state[k] if k in state else target[k] for k in target}


def _some(names: Any) -> str:
    first, *rest = sorted(names)
    shown = ", ".join([first, *rest[:4]])
    return shown if len(rest) <= 4 else f"{shown} and {len(rest) - 4} more"
