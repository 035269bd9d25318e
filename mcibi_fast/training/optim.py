"""Optimisers with parameter groups: layer-wise learning rates, and what weight decay leaves out."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from mcibi_fast.models import Segmentor
from mcibi_fast.recipes.parts import OptimizerConfig

# Position tables have two dimensions or more; timm's models exempt the same ones.
_POSITIONS = ("relative_position_bias_table", "pos_embed", "cls_token", "reg_token")
# A residual or transformer block in the names of timm's feature extractors: layer1.0 (ResNet),
# layers_0.blocks.1 (Swin), stages_0.blocks.1 (ConvNeXt), model.blocks.3 (ViT), stage2.0 (HRNet).
# What comes before the blocks of a stage (a downsampling layer) belongs to the first of them.
_BLOCK = re.compile(r"(?:layer|stage|block)s?[._]?(\d+)(?:(?:\.blocks)?\.(\d+))?\b")


def build_optimizer(
    model: Segmentor, config: OptimizerConfig, *, fused: bool = False
) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, over all of the model's parameters that take a gradient.

    Parameters of one learning rate and one weight decay are one group; by default that is one for
    the whole model. Each group's ``lr`` is its learning rate at the start.

    Args:
        model: a backbone and a head.
        config: settings of the optimiser.
        fused: update all weights in one kernel, if they are on a GPU.

    Raises:
        ValueError: ``layer_decay`` for a backbone whose blocks cannot be told from their names.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    factors = learning_rate_factors(model, config)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = config.decay_norms or not _is_exempt(name, parameter)
        lr, weight_decay = config.lr * factors[name], config.weight_decay if decays else 0.0
        group = {"lr": lr, "weight_decay": weight_decay, "params": []}
        groups.setdefault((lr, weight_decay), group)["params"].append(parameter)
    on_gpu = next(model.parameters()).device.type == "cuda"
    shared: dict[str, Any] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "fused": True if fused and on_gpu else None,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(groups.values(), **shared)
    return torch.optim.SGD(groups.values(), momentum=config.momentum, **shared)


def learning_rate_factors(model: Segmentor, config: OptimizerConfig) -> dict[str, float]:
    """Each parameter's share of ``optimizer.lr``: 1 in the head, less in the backbone if wanted.

    In the backbone it is ``backbone_lr`` times ``layer_decay`` to the number of blocks that follow,
    itself included: layer decay as BEiT has it (arXiv 2106.08254), with the stem as block 0.
    timm's own helper does not know the layers of its feature extractors, whose names differ.

    Raises:
        ValueError: ``layer_decay`` for a backbone without numbered blocks.
    """
    factors = {name: 1.0 for name, _ in model.named_parameters()}
    depths = block_depths(model.backbone)
    blocks = max(depths.values(), default=0)
    if config.layer_decay != 1.0 and blocks == 0:
        raise ValueError("optimizer.layer_decay: this backbone has no blocks with numbers; set 1")
    for name, depth in depths.items():
        decay = config.layer_decay ** (blocks + 1 - depth)
        factors[f"backbone.{name}"] = config.backbone_lr * decay
    return factors


def block_depths(backbone: nn.Module) -> dict[str, int]:
    """For each parameter the number of its block, from 1 in the order of the parameters.

    0 is the stem: what comes before the first block. What comes between and after blocks counts
    with the block before it.
    """
    depths: dict[str, int] = {}
    numbers: dict[tuple[str, str], int] = {}
    depth = 0
    for name, _ in backbone.named_parameters():
        match = _BLOCK.search(name)
        if match is not None:
            block = (name[: match.end(1)], match[2] or "0")
            depth = numbers.setdefault(block, len(numbers) + 1)
        depths[name] = depth
    return depths


def _is_exempt(name: str, parameter: nn.Parameter) -> bool:
    """Norms' weights, biases, and tables of positions."""
    return parameter.ndim <= 1 or name.endswith(_POSITIONS)
