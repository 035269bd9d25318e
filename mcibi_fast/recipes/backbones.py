"""The settings that depend on the backbone (section 4.1 of the paper and the released code)."""

from __future__ import annotations

from typing import Any, Literal

from mcibi_fast.recipes.config import ModelConfig
from mcibi_fast.recipes.parts import OptimizerConfig

Family = Literal["resnet", "resnest", "hrnet", "swin"]
Memory = str | bool | None
"""Which memory a recipe's model has: a name, True for "mcibipp", or None or False for none."""


def family(backbone: str) -> Family:
    """The family whose settings a timm model gets; "resnet" if the paper has no settings for it."""
    if backbone.startswith("resnest"):
        return "resnest"
    if backbone.startswith("hrnet"):
        return "hrnet"
    return "swin" if backbone.startswith("swin") else "resnet"


def model(framework: str, backbone: str, memory: Memory) -> ModelConfig:
    """A framework on a backbone, at the backbone's output stride, with a memory or without.

    As in the released code, an HRNet (stride 4) gets no auxiliary head, since it has no earlier
    stage, and the memory's attention runs at half the resolution. A Swin has the released code's
    rate of stochastic depth, 0.3.

    Args:
        framework: one of `mcibi_fast.models.frameworks()`.
        backbone: any timm model with feature maps.
        memory: one of `mcibi_fast.models.memories()`, True for "mcibipp"; None or False for none.
    """
    options: dict[str, Any] = {}
    if family(backbone) == "swin":
        options |= {"output_stride": 32, "drop_path": 0.3}
    if family(backbone) == "hrnet":
        options |= {"output_stride": 4, "auxiliary_weight": 0.0}
        if memory:
            options["downsample"] = True
    if isinstance(memory, bool):
        memory = "mcibipp" if memory else None
    return ModelConfig(framework, backbone, options, memory)


def optimizer(
    backbone: str, *, lr: float, weight_decay: float, backbone_lr: float = 1.0
) -> OptimizerConfig:
    """SGD with these settings; for a Swin, on any dataset, the AdamW that it was published with."""
    if family(backbone) == "swin":
        return OptimizerConfig(
            name="adamw",
            lr=6e-5,
            weight_decay=0.01,
            power=1.0,
            decay_norms=False,
            warmup_steps=1500,
            warmup_start=1e-6,
        )
    return OptimizerConfig(lr=lr, weight_decay=weight_decay, backbone_lr=backbone_lr)
