"""Wrappers that make timm's feature extractors return four maps, the finest first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Backbone(nn.Module):
    """A timm feature extractor: images (B, 3, H, W) -> at most four maps, finest first.

    Args:
        body: a module with timm's ``feature_info`` that computes feature maps from images.
        pad_to: images are padded with zeros, right and below, to multiples of this.

    Attributes:
        channels: channels of each map.
        reductions: stride of each map; sizes are rounded up or down as the model does.
    """

    def __init__(self, body: Any, *, pad_to: int = 1) -> None:
        super().__init__()
        self.body = body
        self.pad_to = pad_to
        self.channels: list[int] = body.feature_info.channels()[-4:]
        self.reductions: list[int] = body.feature_info.reduction()[-4:]
        # Transformers with windows keep their channels last; timm calls this "NHWC".
        self.nhwc = str(getattr(body, "output_fmt", "")).endswith("NHWC")
        self.register_load_state_dict_post_hook(_compute_again)

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
        return [m.permute(0, 3, 1, 2) for m in maps] if self.nhwc else list(maps)


def _compute_again(backbone: Backbone, _keys: Any) -> None:
    backbone.reset_parameters()


class HighResolutionBackbone(Backbone):
    """HRNetV2: the four branches, resized to the finest one (stride 4) and concatenated.

    The resulting map is returned four times, so that heads with an auxiliary classifier or a
    pyramid work as with any other backbone.

    Args:
        body: timm's HRNet without ``incre`` modules. Its fusions are replaced by ones that resize
            to the size that the finer branch has, so that images may have any size.
        mode: how the fusions upsample: "nearest" (timm) or "bilinear" (the released code).
    """

    def __init__(self, body: Any, *, mode: str = "nearest") -> None:
        super().__init__(body)
        for stage in (body.stage2, body.stage3, body.stage4):
            for index, module in enumerate(stage):
                stage[index] = _Fusion(module, mode)
        self.channels = [sum(self.channels)] * 4
        self.reductions = [self.reductions[0]] * 4

    def forward(self, images: Tensor) -> list[Tensor]:
        finest, *coarser = super().forward(images)
        resized = [_resize(branch, finest, "bilinear") for branch in coarser]
        return [torch.cat([finest, *resized], dim=1)] * 4


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
