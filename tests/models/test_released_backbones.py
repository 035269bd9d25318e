"""Backbones of released checkpoints, against functional forms written from their definitions.

The references read a state dict with the checkpoint's names; nothing of them is shared with the
modules under test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torchvision.models.swin_transformer import shifted_window_attention

from mcibi_fast.models import create_backbone
from mcibi_fast.models.released_backbones import build, released_name
from mcibi_fast.models.released_swin import Swin, region_mask, relative_position_index
from mcibi_fast.nn.fold import fold_batch_norms

State = Mapping[str, Tensor]


def released_state(backbone: nn.Module) -> dict[str, Tensor]:
    state = backbone.state_dict(prefix="backbone.")
    return {
        released_name(name, backbone): value
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }


@torch.no_grad()
def disturb(backbone: nn.Module, generator: torch.Generator) -> nn.Module:
    """Weights in which every part shows in the output."""
    for name, tensor in backbone.state_dict().items():
        if name.endswith(("running_var", "norm.weight")) or (tensor.ndim == 1 and "weight" in name):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif "bias" in name or "running_mean" in name:
            tensor.normal_(std=0.3, generator=generator)
        elif tensor.is_floating_point():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
            tensor.normal_(std=1.5 * fan_in**-0.5, generator=generator)
    return backbone


def check(backbone: nn.Module, images: Tensor, reference: Callable[[State, Tensor], list[Tensor]]):
    state = {k.removeprefix("backbone_net."): v for k, v in released_state(backbone).items()}
    maps, expected = backbone(images), reference(state, images)
    assert len(maps) == len(expected) == 4
    for got, want in zip(maps, expected, strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 1e-10 * want.abs().max()


def random_images(generator: torch.Generator, height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def conv(state: State, name: str, x: Tensor, **options: int) -> Tensor:
    weight = state[f"{name}.weight"]
    options.setdefault("padding", weight.shape[-1] // 2)
    return F.conv2d(x, weight, state.get(f"{name}.bias"), **options)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    entries = [state[f"{name}.{e}"] for e in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *entries)


# ResNeSt


def resnest_reference(state: State, images: Tensor) -> list[Tensor]:
    """At output stride 8: strides 1, 2, 1, 1; dilations 1, 1, 2, 4, the first block's halved."""
    x = conv(state, "stem.0", images, stride=2)
    x = conv(state, "stem.3", norm(state, "stem.1", x).relu())
    x = norm(state, "stem.7", conv(state, "stem.6", norm(state, "stem.4", x).relu())).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    maps = []
    for layer, stride, dilation in ((1, 1, 1), (2, 2, 1), (3, 1, 2), (4, 1, 4)):
        x = resnest_block(state, f"layer{layer}.0", x, stride, max(dilation // 2, 1))
        x = resnest_block(state, f"layer{layer}.1", x, 1, dilation)
        maps.append(x)
    return maps


def resnest_block(state: State, name: str, x: Tensor, stride: int, dilation: int) -> Tensor:
    y = norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", x)).relu()
    y = conv(state, f"{name}.conv2.conv", y, padding=dilation, dilation=dilation, groups=2)
    splits = norm(state, f"{name}.conv2.bn0", y).relu().unflatten(1, (2, -1))
    pooled = conv(state, f"{name}.conv2.fc1", splits.sum(1).mean((2, 3), keepdim=True))
    logits = conv(state, f"{name}.conv2.fc2", norm(state, f"{name}.conv2.bn1", pooled).relu())
    y = (splits * logits.unflatten(1, (2, -1)).softmax(1)).sum(1)
    if stride > 1:
        y = F.avg_pool2d(y, 3, stride, padding=1)
    y = norm(state, f"{name}.bn3", conv(state, f"{name}.conv3", y))
    if f"{name}.downsample.1.weight" in state:
        x = F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
        x = norm(state, f"{name}.downsample.2", conv(state, f"{name}.downsample.1", x))
    return (x + y).relu()


def resnest_state() -> dict[str, Tensor]:
    """Shapes of a narrow ResNeSt with two blocks in each stage."""
    with torch.device("meta"):
        source = create_backbone("resnest26d", output_stride=8)
    return released_state(source)


@torch.no_grad()
def test_resnest(generator):
    backbone = build(resnest_state(), output_stride=8)
    assert backbone is not None and backbone.reductions == [4, 8, 8, 8]
    backbone = disturb(backbone.double().eval(), generator)
    check(backbone, random_images(generator, 45, 62, batch=1), resnest_reference)


# HRNet


def hrnet_reference(state: State, images: Tensor, *, stem_relu: bool = False) -> list[Tensor]:
    x = norm(state, "bn1", conv(state, "conv1", images, stride=2))
    x = x.relu() if stem_relu else x
    x = norm(state, "bn2", conv(state, "conv2", x, stride=2)).relu()
    maps = [hrnet_branch(state, "layer1", x)]
    for stage in (2, 3, 4):
        maps = hrnet_transition(state, f"transition{stage - 1}", maps)
        modules = {name.split(".")[1] for name in state if name.startswith(f"stage{stage}.")}
        for module in sorted(modules):
            maps = hrnet_module(state, f"stage{stage}.{module}", maps)
    resized = [bilinear(m, maps[0]) for m in maps]
    return [torch.cat(resized, dim=1)] * 4


def hrnet_transition(state: State, name: str, maps: list[Tensor]) -> list[Tensor]:
    """One more branch, from the coarsest; the first transition also narrows the one there is."""
    kept = list(maps)
    if f"{name}.0.0.weight" in state:
        kept[0] = norm(state, f"{name}.0.1", conv(state, f"{name}.0.0", maps[0])).relu()
    new = f"{name}.{len(maps)}.0"
    return [*kept, norm(state, f"{new}.1", conv(state, f"{new}.0", maps[-1], stride=2)).relu()]


def hrnet_branch(state: State, name: str, x: Tensor) -> Tensor:
    for block in sorted(
        {n[len(name) + 1 :].split(".")[0] for n in state if n.startswith(f"{name}.")}
    ):
        b = f"{name}.{block}"
        y = norm(state, f"{b}.bn1", conv(state, f"{b}.conv1", x)).relu()
        y = norm(state, f"{b}.bn2", conv(state, f"{b}.conv2", y))
        if f"{b}.conv3.weight" in state:
            y = norm(state, f"{b}.bn3", conv(state, f"{b}.conv3", y.relu()))
        if f"{b}.downsample.0.weight" in state:
            x = norm(state, f"{b}.downsample.1", conv(state, f"{b}.downsample.0", x))
        x = (x + y).relu()
    return x


def hrnet_module(state: State, name: str, maps: list[Tensor]) -> list[Tensor]:
    maps = [hrnet_branch(state, f"{name}.branches.{i}", m) for i, m in enumerate(maps)]
    fused = []
    for i in range(len(maps)):
        total = maps[i]
        for j in range(len(maps)):
            layer, term = f"{name}.fuse_layers.{i}.{j}", maps[j]
            if j > i:
                term = norm(state, f"{layer}.1", conv(state, f"{layer}.0", term))
                # First by a power of 2; at sides that 32 does not divide this is not yet the size.
                term = F.interpolate(term, scale_factor=2.0 ** (j - i), mode="bilinear")
                total = total + bilinear(term, maps[i])
            elif j < i:
                for k in range(i - j):
                    term = conv(state, f"{layer}.{k}.0", term.relu() if k else term, stride=2)
                    term = norm(state, f"{layer}.{k}.1", term)
                total = total + term
        fused.append(total.relu())
    return fused


def bilinear(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "stem_relu"), [((64, 96), False), ((75, 53), False), ((57, 70), True)]
)
def test_hrnet(generator, size, stem_relu):
    with torch.device("meta"):
        source = released_state(create_backbone("hrnet_w18_small_v2", output_stride=4))
    backbone = build(source, output_stride=8, stem_relu=stem_relu)
    assert backbone is not None and backbone.reductions == [4] * 4
    backbone = disturb(backbone.double().eval(), generator)
    reference = partial(hrnet_reference, stem_relu=stem_relu)
    check(backbone, random_images(generator, *size, batch=1), reference)


@torch.no_grad()
@pytest.mark.parametrize("model", ["hrnet_w18_small_v2", "resnest26d"])
def test_folded_batch_norms_change_nothing(model, generator):
    with torch.device("meta"):
        stride = 4 if model.startswith("hrnet") else 8
        source = released_state(create_backbone(model, output_stride=stride))
    backbone = build(source, output_stride=8)
    assert backbone is not None
    backbone = disturb(backbone.double().eval(), generator)
    images = random_images(generator, 53, 40, batch=1)
    before = backbone(images)
    fold_batch_norms(backbone)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    for folded, expected in zip(backbone(images), before, strict=True):
        assert (folded - expected).abs().max() <= 1e-12 * expected.abs().max()


# Swin

WIDTH, DEPTHS, HEADS, WINDOW = 8, (2, 3, 2, 2), (1, 2, 2, 4), 4


def swin_reference(state: State, images: Tensor) -> list[Tensor]:
    height, width = images.shape[2:]
    images = F.pad(images, (0, -width % 4, 0, -height % 4))
    weight, bias = state["patch_embed.projection.weight"], state["patch_embed.projection.bias"]
    x = layer_norm(state, "patch_embed.norm", F.conv2d(images, weight, bias, 4).movedim(1, 3))
    maps = []
    for i, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        for j in range(depth):
            block, shift = f"stages.{i}.blocks.{j}", WINDOW // 2 if j % 2 else 0
            y = layer_norm(state, f"{block}.norm1", x)
            x = x + attention_reference(state, f"{block}.attn.w_msa", y, heads, shift)
            y = linear(state, f"{block}.ffn.layers.0.0", layer_norm(state, f"{block}.norm2", x))
            x = x + linear(state, f"{block}.ffn.layers.1", F.gelu(y))
        maps.append(layer_norm(state, f"norm{i}", x).movedim(3, 1))
        if i < 3:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            h, w = x.shape[1] // 2, x.shape[2] // 2
            x = F.unfold(x.movedim(3, 1), 2, stride=2).transpose(1, 2).unflatten(1, (h, w))
            x = layer_norm(state, f"stages.{i}.downsample.norm", x)
            x = linear(state, f"stages.{i}.downsample.reduction", x)
    return maps


def attention_reference(state: State, name: str, x: Tensor, heads: int, shift: int) -> Tensor:
    """All pairs of positions of the padded map at once.

    A position's place in the shifted map says its window, and in each direction whether it was
    rolled round. Pairs of one window attend; pairs of one window of which one was rolled round
    and the other was not get -100.
    """
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
    padded = x.shape[1:3]
    places, rolled = [], []
    for size in padded:
        places.append((torch.arange(size) - shift) % size)
        rolled.append(torch.arange(size) < shift)
    py, px = (t.flatten() for t in torch.meshgrid(*places, indexing="ij"))
    ry, rx = (t.flatten() for t in torch.meshgrid(*rolled, indexing="ij"))
    window = py // WINDOW * padded[1] + px // WINDOW
    same_window = window[:, None] == window[None, :]
    same_region = (ry[:, None] == ry[None, :]) & (rx[:, None] == rx[None, :])

    dy = (py[:, None] - py[None, :]).clamp(1 - WINDOW, WINDOW - 1) + WINDOW - 1
    dx = (px[:, None] - px[None, :]).clamp(1 - WINDOW, WINDOW - 1) + WINDOW - 1
    table = state[f"{name}.relative_position_bias_table"].unflatten(0, (2 * WINDOW - 1, -1))
    q, k, v = (
        t.unflatten(2, (heads, -1)).transpose(1, 2)
        for t in linear(state, f"{name}.qkv", x.flatten(1, 2)).chunk(3, dim=2)
    )
    logits = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5 + table[dy, dx].movedim(2, 0)
    logits = logits + torch.where(same_region, 0.0, -100.0)
    weights = logits.masked_fill(~same_window, -torch.inf).softmax(3)
    out = linear(state, f"{name}.proj", (weights @ v).transpose(1, 2).flatten(2))
    return out.unflatten(1, padded)[:, :height, :width]


def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def small_swin(generator: torch.Generator) -> nn.Module:
    state = {
        f"backbone_net.{k}": v for k, v in Swin(WIDTH, DEPTHS, HEADS, WINDOW).state_dict().items()
    }
    backbone = build(state, output_stride=8)
    assert backbone is not None
    assert backbone.channels == [8, 16, 32, 64] and backbone.reductions == [4, 8, 16, 32]
    return disturb(backbone.double().eval(), generator)


# Maps of 10 x 13, 5 x 7, 3 x 4 and 2 x 2, in which all stages pad and the last two are one window;
# 16 x 32, 8 x 16, 4 x 8 and 2 x 4; images that are no multiple of the patch.
@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 52), (64, 128), (37, 30)])
def test_swin(generator, size):
    check(small_swin(generator), random_images(generator, *size), swin_reference)


def timm_swin(size: int) -> nn.Module:
    model = SwinTransformer(
        img_size=size,
        embed_dim=WIDTH,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=WINDOW,
        always_partition=True,  # else the last stages, of one window, would not shift
        num_classes=0,
    )
    return model.double().eval()


@torch.no_grad()
def test_swin_is_timms_where_nothing_is_padded(generator):
    backbone = small_swin(generator)
    own = {k.removeprefix("body."): v for k, v in backbone.state_dict().items()}
    order = torch.arange(4).view(2, 2).T.flatten()  # timm's patches run down the columns

    def timms(name: str, value: Tensor) -> tuple[str, Tensor]:
        if ".downsample." in name:
            *_, stage, _, entry, kind = name.split(".")
            name = f"layers.{int(stage) + 1}.downsample.{entry}.{kind}"
            value = value.unflatten(-1, (-1, 4))[..., order].transpose(-1, -2).flatten(-2)
        for old, new in (
            ("stages.", "layers."),
            ("attn.w_msa.", "attn."),
            ("ffn.layers.0.0.", "mlp.fc1."),
            ("ffn.layers.1.", "mlp.fc2."),
            ("projection.", "proj."),
            ("norm3.", "norm."),
        ):
            name = name.replace(old, new)
        return name, value

    converted = dict(timms(*entry) for entry in own.items() if "_index" not in entry[0])
    for i in range(3):  # timm has no norms of the other outputs
        del converted[f"norm{i}.weight"], converted[f"norm{i}.bias"]

    def difference(size: int) -> float:
        images = random_images(generator, size, size)
        model = timm_swin(size)
        model.load_state_dict(converted)
        expected = model.forward_features(images).movedim(3, 1)
        return float((backbone(images)[3] - expected).abs().max() / expected.abs().max())

    assert difference(128) <= 1e-10
    assert difference(104) > 1e-3  # maps of 26, 13, 7 and 4: timm shifts what is not padded yet


@torch.no_grad()
@pytest.mark.parametrize("size", [(10, 13), (5, 8), (16, 12)])
def test_shifted_attention_is_torchvisions(generator, size):
    attention = small_swin(generator).get_submodule("body.stages.1.blocks.1.attn")
    inner = attention.get_submodule("w_msa")
    x = torch.randn(2, *size, 16, generator=generator, dtype=torch.float64)
    index = relative_position_index(WINDOW)
    bias = inner.get_parameter("relative_position_bias_table")[index].permute(2, 0, 1)
    expected = shifted_window_attention(
        x,
        inner.get_parameter("qkv.weight"),
        inner.get_parameter("proj.weight"),
        bias[None],
        [WINDOW, WINDOW],
        num_heads=2,
        shift_size=[WINDOW // 2, WINDOW // 2],
        qkv_bias=inner.get_parameter("qkv.bias"),
        proj_bias=inner.get_parameter("proj.bias"),
    )
    got = attention(x, region_mask(x, WINDOW))
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()


# All released configurations


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("mcibiplusplus_upernet_swinlarge_ade20k", [192, 384, 768, 1536]),
        ("mcibiplusplus_aspp_hrnetv2w48_cityscapes", [720, 720, 720, 720]),
        ("mcibiplusplus_upernet_resnest101os8_ade20k", [256, 512, 1024, 2048]),
    ],
)
def test_published_shapes(name, channels, published_shapes):
    shapes = published_shapes[name]
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with torch.device("meta"):
        backbone = build(state, output_stride=8)
    assert backbone is not None
    assert backbone.channels == channels
    assert {key: list(value.shape) for key, value in released_state(backbone).items()} == {
        key: shape for key, shape in shapes.items() if key.startswith("backbone_net.")
    }


def test_others_are_left_alone():
    plain = {"backbone_net.stem.0.weight": torch.zeros(1), "bottleneck.0.weight": torch.zeros(1)}
    assert build(plain, output_stride=8) is None
    assert build({}, output_stride=8) is None
    assert released_name("head.decoder.weight", nn.Identity()) == "head.decoder.weight"
