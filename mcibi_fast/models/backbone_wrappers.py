"""Wrappers that make timm's feature extractors return four maps, the finest first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.nn.blocks import conv_bn_relu


class Backbone(nn.Module):
    """A timm feature extractor: images (B, 3, H, W) -> at most four maps, finest first.

    Args:
        body: a module with timm's ``feature_info`` that computes feature maps from images.
        pad_to: images are padded with zeros, right and below, to multiples of this.

    Attributes:
        channels: channels of each map.
        reductions: stride of each map; sizes are rounded up or down as the model does.
        neck: what the maps pass through, see :meth:`add_neck`; None by default.
    """

    def __init__(self, body: Any, *, pad_to: int = 1) -> None:
        super().__init__()
        self.body = body
        self.pad_to = pad_to
        self.neck: Neck | None = None
        self.channels: list[int] = body.feature_info.channels()[-4:]
        self.reductions: list[int] = body.feature_info.reduction()[-4:]
        # Transformers with windows keep their channels last; timm calls this "NHWC".
        self.nhwc = str(getattr(body, "output_fmt", "")).endswith("NHWC")
        self.register_load_state_dict_post_hook(_compute_again)

    def add_neck(self, *, norms: bool, halve: bool) -> None:
        """Lets the maps pass through a :class:`Neck`.

        Raises:
            ValueError: ``halve`` for a backbone with different maps.
        """
        if halve and len(set(self.reductions)) > 1:
            raise ValueError(f"halve: needs maps of one stride, got {self.reductions}")
        self.neck = Neck(self.channels, norms=norms, halve=halve)
        if halve:
            self.reductions = [2 * reduction for reduction in self.reductions]

    def reset_parameters(self) -> None:
        """Computes again what timm's modules keep outside the state dict, as Swin's indices.

        Loading a state dict does so, too: before, the model may have been built without values.
        """
        parameter = next(self.body.parameters(), None)
        device = parameter.device if parameter is not None else torch.get_default_device()
        for module in self.body.modules():
            if hasattr(module, "init_non_persistent_buffers"):
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.device != device:
                        module._buffers[name] = torch.empty_like(buffer, device=device)
                module.init_non_persistent_buffers()

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.pad_to > 1:
            height, width = images.shape[2:]
            images = F.pad(images, (0, -width % self.pad_to, 0, -height % self.pad_to))
        maps = self.body(images)[-len(self.channels) :]
        maps = [m.permute(0, 3, 1, 2) for m in maps] if self.nhwc else list(maps)
        return maps if self.neck is None else self.neck(maps)


class Neck(nn.Module):
    """What some of MCIBI's released models have between backbone and head.

    Args:
        channels: channels of each map, finest first.
        norms: each map passes through a layer norm over its channels (ViT).
        halve: the map passes through Conv3x3-BN-ReLU of stride 2 (HRNet, all of whose maps are one
            and the same).
    """

    def __init__(self, channels: Sequence[int], *, norms: bool, halve: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in channels) if norms else None
        self.halve = conv_bn_relu(channels[0], channels[0], 3, stride=2) if halve else None
        if self.halve is not None:
            # The released code halves the one map that all of HRNet's are once for each of them, so
            # that the running statistics move as often.
            norm: Any = self.halve[1]
            norm.momentum = 1 - (1 - norm.momentum) ** len(channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        if self.norms is not None:
            maps = [
                norm(m.movedim(1, 3)).movedim(3, 1)
                for norm, m in zip(self.norms, maps, strict=True)
            ]
        return maps if self.halve is None else [self.halve(maps[0])] * len(maps)


def _compute_again(backbone: Backbone, _keys: Any) -> None:
    backbone.reset_parameters()


class HighResolutionBackbone(Backbone):
    """HRNetV2: the four branches, resized to the finest one (stride 4) and concatenated.

    The resulting map is returned four times, so that heads with an auxiliary classifier or a
    pyramid work as with any other backbone.

    Args:
        body: timm's HRNet without ``incre`` modules. Its fusions are replaced by ones that resize
            to the size that the finer branch has, so that images may have any size.
        mode: how the fusions upsample: "nearest" (timm) or "bilinear" (the released code, which
            first upsamples by a power of 2 and then to the finer branch's size; at image sides that
            32 does not divide, this is not the same as resizing once).
    """

    def __init__(self, body: Any, *, mode: str = "nearest") -> None:
        super().__init__(body)
        for stage in (body.stage2, body.stage3, body.stage4):
            for index, module in enumerate(stage):
                stage[index] = _Fusion(module, mode)
        self.channels = [sum(self.channels)] * 4
        self.reductions = [self.reductions[0]] * 4

    def forward(self, images: Tensor) -> list[Tensor]:
        finest, *coarser = self.body(images)[-4:]
        resized = [_resize(branch, finest, "bilinear") for branch in coarser]
        maps = [torch.cat([finest, *resized], dim=1)] * 4
        return maps if self.neck is None else self.neck(maps)


class _Fusion(nn.Module):
    """A HRNet module: each branch through its blocks, then the sum of all branches at each size."""

    def __init__(self, module: Any, mode: str) -> None:
        super().__init__()
        self.branches = module.branches
        self.fuse_layers = module.fuse_layers
        self.act = module.fuse_act
        self.mode = mode
        for row in self.fuse_layers:
            for layer in row:
                if isinstance(layer, nn.Sequential) and isinstance(layer[-1], nn.Upsample):
                    if mode == "bilinear":
                        layer[-1] = nn.Upsample(scale_factor=layer[-1].scale_factor, mode=mode)
                    else:
                        del layer[-1]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(m) for branch, m in zip(self.branches, maps, strict=True)]
        fused = []
        for i, row in enumerate(self.fuse_layers):
            terms = [layer(m) for layer, m in zip(row, maps, strict=True)]
            terms[i + 1 :] = [_resize(term, maps[i], self.mode) for term in terms[i + 1 :]]
            fused.append(self.act(sum(terms[1:], terms[0])))
        return fused


def _resize(x: Tensor, like: Tensor, mode: str) -> Tensor:
    align_corners = False if mode == "bilinear" else None  # "nearest" accepts neither value
    return F.interpolate(x, size=like.shape[2:], mode=mode, align_corners=align_corners)
