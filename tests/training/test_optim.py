"""Parameter groups, and that every group keeps its ratio under the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from mcibi_fast import models
from mcibi_fast.models import Segmentor
from mcibi_fast.models.backbones import create_backbone
from mcibi_fast.recipes import OptimizerConfig
from mcibi_fast.training.optim import block_depths, build_optimizer, learning_rate_factors
from mcibi_fast.training.schedule import Schedule, poly_factor, warmup_factor


def make_model(backbone: str = "test_resnet") -> Segmentor:
    return models.create("fcn", 3, backbone=backbone, feats_channels=8)


@pytest.fixture(autouse=True)
def keep_the_global_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def names_of(model: nn.Module, group: dict) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_by_default_one_group_of_what_takes_a_gradient() -> None:
    model = make_model()
    model.head.decoder.requires_grad_(False)
    sgd = build_optimizer(model, OptimizerConfig())
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.9
    (group,) = sgd.param_groups
    expected = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in group["params"]] == [id(p) for p in expected]
    assert (group["lr"], group["weight_decay"]) == (0.01, 5e-4)
    adamw = build_optimizer(model, OptimizerConfig(name="adamw", weight_decay=0.3))
    assert isinstance(adamw, torch.optim.AdamW)
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.3]


def test_the_backbone_at_a_tenth() -> None:
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.5, backbone_lr=0.1))
    groups = {group["lr"]: names_of(model, group) for group in optimizer.param_groups}
    assert groups.keys() == {0.05, 0.5}
    assert groups[0.05] == {n for n, _ in model.named_parameters() if n.startswith("backbone.")}


def test_norms_biases_and_position_tables_do_not_decay() -> None:
    model = make_model()
    model.backbone.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
    optimizer = build_optimizer(model, OptimizerConfig(decay_norms=False))
    groups = {group["weight_decay"]: names_of(model, group) for group in optimizer.param_groups}
    assert groups.keys() == {0.0, 5e-4}
    norms = {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for name, _ in module.named_parameters()
    }
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert groups[0.0] == norms | biases | {"backbone.relative_position_bias_table"}


# Blocks in the order of the forward pass: 4 of ResNet, Swin-T's 2 + 2 + 6 + 2, ViT-Ti's 12.
@pytest.mark.parametrize(
    ("name", "stride", "blocks", "examples"),
    [
        ("test_resnet", 8, 4, {"conv1.0.weight": 0, "layer1.0.conv1.weight": 1}),
        (
            "swin_tiny_patch4_window7_224",
            32,
            12,
            {
                "patch_embed.proj.weight": 0,
                "layers_0.blocks.1.attn.relative_position_bias_table": 2,
                "layers_1.downsample.reduction.weight": 3,
                "layers_1.blocks.0.norm1.weight": 3,
                "layers_3.blocks.1.mlp.fc2.bias": 12,
            },
        ),
        (
            "vit_tiny_patch16_224",
            16,
            12,
            {
                "model.pos_embed": 0,
                "model.blocks.0.norm1.weight": 1,
                "model.blocks.11.attn.qkv.bias": 12,
            },
        ),
        ("convnext_atto", 8, 12, {"stem_0.weight": 0, "stages_1.blocks.0.conv_dw.weight": 3}),
    ],
)
def test_block_depths(name: str, stride: int, blocks: int, examples: dict[str, int]) -> None:
    depths = block_depths(create_backbone(name, output_stride=stride))
    assert set(depths.values()) == set(range(blocks + 1))
    assert {key: depths[f"body.{key}"] for key in examples} == examples


def test_layer_decay() -> None:
    model = make_model()
    factors = learning_rate_factors(model, OptimizerConfig(backbone_lr=0.5, layer_decay=0.8))
    assert factors["backbone.body.layer4.0.conv1.weight"] == pytest.approx(0.5 * 0.8)
    assert factors["backbone.body.layer1.0.conv1.weight"] == pytest.approx(0.5 * 0.8**4)
    assert factors["backbone.body.conv1.0.weight"] == pytest.approx(0.5 * 0.8**5)
    assert {f for n, f in factors.items() if n.startswith("head.")} == {1.0}
    model.backbone = nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match=r"optimizer\.layer_decay: this backbone has no blocks"):
        learning_rate_factors(model, OptimizerConfig(layer_decay=0.8))


def test_every_group_keeps_its_ratio_through_warm_up_and_poly() -> None:
    config = OptimizerConfig(
        lr=0.2, backbone_lr=0.1, layer_decay=0.9, decay_norms=False, warmup_steps=4, floor=0.01
    )
    optimizer = build_optimizer(make_model(), config)
    initial = [group["lr"] for group in optimizer.param_groups]
    assert len(set(initial)) > 4
    schedule = Schedule(optimizer, config, 10)
    for step in range(10):
        factor = schedule.apply(step)
        assert factor == poly_factor(step, 10, floor=0.01) * warmup_factor(step, 4)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [lr * factor for lr in initial]
        assert schedule.lr == 0.2 * factor


def test_warm_up() -> None:
    factors = [warmup_factor(step, 4, start=0.2) for step in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert warmup_factor(0, 0) == 1.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.backbone_lr=-1", "optimizer.backbone_lr: expected 0 or more, got -1"),
        ("optimizer.layer_decay=0", "optimizer.layer_decay: expected above 0, at most 1, got 0"),
        ("optimizer.layer_decay=1.1", "optimizer.layer_decay"),
        ("optimizer.warmup_steps=-2", "optimizer.warmup_steps"),
        ("optimizer.warmup_start=2", "optimizer.warmup_start"),
        ("optimizer.lr=Infinity", "optimizer.lr: expected a positive number, got inf"),
    ],
)
def test_numbers_that_make_no_sense(tiny_config: Callable, setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(setting).validate()
