"""The released package's models, built from the model zoo's settings with random weights.

The settings are written here as dictionaries of our own; the package's configuration files are not
used. `small=True` builds narrow models with the same structure.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mcibi_fast.compat.zoo import Published, published

ssseg = pytest.importorskip(
    "ssseg", reason="needs the authors' package: pip install sssegmentation pandas dill"
)

from ssseg.modules.models.backbones import hrnet as released_hrnet  # noqa: E402
from ssseg.modules.models.segmentors import builder  # noqa: E402
from ssseg.modules.utils import SSSegInputStructure  # noqa: E402

PUBLISHED = {each.name: each for each in published()}
SMALL_WIDTH = 16  # Z of the small models
LOSS = {"type": "CrossEntropyLoss", "ignore_index": -100, "reduction": "mean"}


def _small_hrnet() -> dict[str, object]:
    def stage(branches: int, block: str, channels: tuple[int, ...]) -> dict[str, object]:
        return {
            "num_modules": 1,
            "num_branches": branches,
            "block": block,
            "num_blocks": (1,) * branches,
            "num_channels": channels,
        }

    return {
        "stage1": stage(1, "BOTTLENECK", (8,)),
        "stage2": stage(2, "BASIC", (4, 8)),
        "stage3": stage(3, "BASIC", (4, 8, 16)),
        "stage4": stage(4, "BASIC", (4, 8, 16, 32)),
    }


def backbone_settings(name: str, *, small: bool) -> tuple[dict[str, object], list[int]]:
    """Settings of a backbone, and the channels of its maps."""
    common: dict[str, object] = {"structure_type": "random", "pretrained": False}
    if name.startswith("resn"):
        kind = "ResNeSt" if name.startswith("resnest") else "ResNet"
        depth = int("".join(c for c in name.removesuffix("os8") if c.isdigit()))
        settings = common | {"type": kind, "depth": depth, "outstride": 8}
        base = 64
        if small and kind == "ResNet":
            base = 4
            settings |= {"base_channels": 4, "stem_channels": 8}
        elif small:  # its split attention has at least 32 channels
            base = 8
            settings |= {"base_channels": 8, "stem_channels": 8}
        return settings, [4 * base * 2**i for i in range(4)]
    if name == "hrnetv2w48":
        arch = "small" if small else "hrnetv2_w48"
        return common | {"type": "HRNet", "arch": arch}, [60 if small else 720] * 4
    if name == "swinlarge":
        width, depths, heads = (8, [2, 2, 2, 2], [1, 1, 2, 2]) if small else (
            192, [2, 2, 18, 2], [6, 12, 24, 48]
        )  # fmt: skip
        sizes = {"embed_dims": width, "depths": depths, "num_heads": heads}
        sizes |= {"window_size": 4 if small else 12, "patch_size": 4, "mlp_ratio": 4}
        sizes |= {"norm_cfg": {"type": "LayerNorm"}, "drop_path_rate": 0.0}
        return common | {"type": "SwinTransformer"} | sizes, [width * 2**i for i in range(4)]
    assert name == "vitlarge"
    width, heads, side = (64, 1, 3) if small else (1024, 16, 32)
    sizes = {"embed_dims": width, "num_heads": heads, "num_layers": 24, "patch_size": 16}
    sizes |= {"img_size": (16 * side, 16 * side), "out_indices": (9, 14, 19, 23)}
    sizes |= {"norm_cfg": {"type": "LayerNorm", "eps": 1e-6}, "drop_rate": 0.0}
    return common | {"type": "VisionTransformer"} | sizes, [width] * 4


def settings(entry: Published, *, small: bool, dropout: float = 0.0) -> dict[str, object]:
    """Settings of a published model, as the package's builder takes them."""
    layout, hidden = entry.layout, entry.hidden
    backbone, widths = backbone_settings(layout.backbone, small=small)
    Z = SMALL_WIDTH if small else 512
    activation: dict[str, object] = {"type": "ReLU", "inplace": True}
    if hidden.negative_slope:
        slope = hidden.negative_slope
        activation = {"type": "LeakyReLU", "negative_slope": slope, "inplace": True}
    auxiliary: object = {"in_channels": widths[-2], "out_channels": Z, "dropout": dropout}
    losses = ["loss_aux"]
    if layout.backbone == "hrnetv2w48":
        auxiliary, losses = None, []
    elif layout.backbone == "vitlarge":
        one = {"in_channels": widths[0], "out_channels": Z, "dropout": dropout}
        auxiliary = [one | {"num_convs": 2, "upsample": {"scale_factor": 4}}] * 3
        losses = ["loss_aux1", "loss_aux2", "loss_aux3"]
    heads = {"mcibiplusplus": _mcibipp_head, "mcibi": _mcibi_head, "isnet": _isnet_head}
    head, own_losses = heads[layout.method](entry, widths, Z, dropout, small)
    scales = dict.fromkeys(losses, 0.4) | own_losses
    return {
        "type": {"mcibiplusplus": "MCIBIPlusPlus", "mcibi": "MCIBI", "isnet": "ISNet"}[
            layout.method
        ],
        "num_classes": layout.classes,
        "align_corners": False,
        "norm_cfg": {"type": "BatchNorm2d"},
        "act_cfg": activation,
        "backbone": backbone,
        "head": head
        | {"in_channels": widths[-1], "feats_channels": Z, "transform_channels": Z // 2},
        "auxiliary": auxiliary,
        "losses": {name: LOSS | {"scale_factor": scale} for name, scale in scales.items()},
    }


def _context(entry: Published) -> dict[str, object]:
    return {
        "is_on": entry.layout.context != "none",
        "type": entry.layout.context,
        "use_self_attention": entry.layout.extra_attention,
        "cfg": {"pool_scales": [1, 2, 3, 6], "dilations": list(entry.hidden.dilations)},
    }


def _mcibipp_head(entry, widths, Z, dropout, small):
    layout = entry.layout
    within = layout.context != "none"
    head = {
        "context_within_image": _context(entry),
        "warmup_epoch": 0,
        "use_hard_aggregate": False,
        "downsample_before_sa": layout.downsample,
        "force_use_preds_pr": entry.hidden.weights_from == "pr",
        "fuse_memory_cwi_before_fpn": True,
        "out_channels": Z,
        "update_cfg": {
            "ignore_index": -100,
            "momentum_cfg": {
                "base_momentum": 0.1,
                "base_lr": None,
                "adjust_by_learning_rate": False,
            },
        },
    }
    last = 2 * Z if within else Z
    if layout.pyramid:
        pyramid = int(Z * layout.pyramid)
        head["fpn"] = {
            "in_channels_list": widths,
            "feats_channels": 2 * Z,
            "out_channels": pyramid,
        }
        last = 3 * pyramid + 2 * Z
    inputs = {"pr": Z, "cwi": Z, "cls": last}
    head["decoder"] = {
        name: {
            "in_channels": inputs[name],
            "out_channels": Z,
            "dropout": dropout,
            "kernel_size": kernel,
            "padding": kernel // 2,
        }
        for name, kernel in zip(("pr", "cwi", "cls"), layout.kernel_sizes, strict=True)
    }
    losses = {"loss_pr": 0.4, "loss_cls": 1.0} | ({"loss_cwi": 1.0} if within else {})
    return head, losses


def _mcibi_head(entry, widths, Z, dropout, small):
    context = _context(entry)
    del context["cfg"]["pool_scales"]  # what the context does not take is an error here
    head = {
        "context_within_image": context,
        "downsample_backbone": {
            "kernel_size": 3,
            "stride": 2 if entry.layout.downsample else 1,
            "padding": 1,
            "bias": False,
        },
        "num_feats_per_cls": 1,
        "use_hard_aggregate": False,
        "out_channels": Z,
        "dropout": dropout,
        "use_loss": entry.dataset == "ade20k",
        "loss_cfg": LOSS | {"scale_factor": 1.0},
        "update_cfg": {
            "strategy": "cosine_similarity",
            "ignore_index": -100,
            "momentum_cfg": {
                "base_momentum": 0.9,
                "base_lr": 0.01,
                "adjust_by_learning_rate": True,
            },
        },
    }
    if entry.layout.backbone == "vitlarge":
        head["norm_cfg"] = {"in_channels_list": widths, "type": "LayerNorm", "eps": 1e-6}
    return head, {"loss_cls_stage1": 0.4, "loss_cls_stage2": 1.0}


def _isnet_head(entry, widths, Z, dropout, small):
    head = {
        "concat_input": True,
        "dropout": dropout,
        "shortcut": {
            "is_on": entry.layout.shortcut,
            "in_channels": widths[0],
            "feats_channels": 6 if small else 48,
        },
    }
    return head, {"loss_cls_stage1": 0.4, "loss_cls_stage2": 1.0}


class _AfterTheFirst(nn.Module):
    """An activation that skips every other call, beginning with the first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x if self.calls % 2 else x.relu()


def repaired(model: nn.Module, entry: Published) -> nn.Module:
    """An HRNet as the published checkpoints need it: the stem of Cityscapes' has one ReLU less.

    The released package lacks the switch for it.
    """
    if entry.layout.backbone == "hrnetv2w48" and not entry.hidden.stem_relu:
        model.backbone_net.relu = _AfterTheFirst()
    return model


def build(config: dict[str, object], *, mode: str = "TEST") -> nn.Module:
    """A model of the package; HRNet is repaired, which the package itself cannot build."""
    with pytest.MonkeyPatch.context() as patch:
        # It reads the attribute before it sets it.
        patch.setattr(released_hrnet.HRModule, "use_checkpoint", False, raising=False)
        patch.setitem(released_hrnet.HRNet.arch_settings, "small", _small_hrnet())
        with torch.random.fork_rng(devices=[]):
            return builder.BuildSegmentor(config, mode=mode)


def released(entry: Published, *, small: bool = True, dropout: float = 0.0) -> nn.Module:
    """A published model in evaluation mode, with fresh weights."""
    model = build(settings(entry, small=small, dropout=dropout)).eval()
    return repaired(model, entry)


@torch.no_grad()
def scramble(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random weights, statistics and memory in which every part shows in the output."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("memory_module.memory"):
            tensor.normal_(generator=generator)
            if tensor.ndim == 2:
                tensor[:, 1].abs_()
        elif name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 1 or "pos_embed" in name or "cls_token" in name:
            tensor.normal_(std=0.3, generator=generator)
        else:
            fan_in = tensor[0].numel() if tensor.ndim else 1
            tensor.normal_(std=1.4 * fan_in**-0.5, generator=generator)
        if "bn3.weight" in name or ("branches" in name and "bn2.weight" in name):
            tensor *= 0.3  # residual branches: else a deep network's activations explode
    return model


def checkpoint(model: nn.Module) -> dict[str, object]:
    """What the trainer saves, without the optimiser."""
    return {"model": {k: v.clone() for k, v in model.state_dict().items()}, "cur_epoch": 3}


def inputs(images: Tensor, labels: Tensor | None = None, mode: str = "TEST"):
    """The package's input of images and labels."""
    annotations = {} if labels is None else {"seg_targets": labels}
    return SSSegInputStructure(images=images, mode=mode, **annotations)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor, **options: object) -> Tensor:
    """The package's logits before the last upsampling."""
    with torch.random.fork_rng(devices=[]):  # it seeds the global generator
        return model(inputs(images), **options).seg_logits
