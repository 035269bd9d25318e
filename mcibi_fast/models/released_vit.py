"""ViT as MCIBI's released checkpoints have it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import Tensor, nn

from mcibi_fast.models.checkpointing import Checkpointed

EPSILON = 1e-6  # of every layer norm


class ViT(Checkpointed):
    """Images (B, 3, H, W) of any size -> the maps of some blocks, all of the patches' stride.

    Images are padded with zeros to whole patches, below and on the right. Positions are resized
    bilinearly if an image has another number of patches than there are positions.

    Args:
        width: channels of the maps.
        depth: number of blocks.
        heads: number of attention heads.
        side: the positions form a square of this side.
        mlp_ratio: hidden channels of a feed-forward layer divided by its input channels.
        patch_size: stride of the maps.
        blocks: numbers of the blocks, from 0, whose results are returned.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        side: int,
        *,
        mlp_ratio: int = 4,
        patch_size: int = 16,
        blocks: Sequence[int] = (9, 14, 19, 23),
    ) -> None:
        super().__init__()
        if not blocks or max(blocks) >= depth:
            raise ValueError(f"blocks: a ViT of {depth} blocks has none of {tuple(blocks)}")
        self.side = side
        self.blocks = tuple(blocks)
        self.patch_size = patch_size
        self.patch_embed = nn.ModuleDict(
            {"projection": nn.Conv2d(3, width, patch_size, patch_size)}  # the checkpoints' name
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side + 1, width))
        self.layers = nn.ModuleList(_Block(width, heads, mlp_ratio) for _ in range(depth))
        self.reset_parameters()
        self.feature_info = FeatureInfo(
            [
                {"num_chs": width, "reduction": patch_size, "module": f"layers.{i}"}
                for i in self.blocks
            ],
            tuple(range(len(self.blocks))),
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets what is not in a submodule as after ``__init__``."""
        nn.init.zeros_(self.cls_token)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's: whether training computes the blocks again in the backward pass."""
        self.gradient_checkpointing = enable

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        patches = self.patch_embed["projection"](images)  # (B, C, h, w)
        size = patches.shape[2:]
        token = self.cls_token.expand(len(images), -1, -1)
        x = torch.cat([token, patches.flatten(2).mT], dim=1) + self.positions(size)
        maps = []
        for i, layer in enumerate(self.layers):
            x = self._run(layer, x)
            if i in self.blocks:
                maps.append(x[:, 1:].mT.unflatten(2, size))
        return maps

    def positions(self, size: torch.Size) -> Tensor:
        """The positions (1, 1 + h w, C) of a class token and of h x w patches.

        As in the released code it is their number, not their arrangement, that says whether they
        are resized.
        """
        if size.numel() == self.side**2:
            return self.pos_embed
        token, square = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = square.mT.unflatten(2, (self.side, self.side))
        resized = F.interpolate(square, size=size, mode="bilinear", align_corners=False)
        return torch.cat([token, resized.flatten(2).mT], dim=1)


class _Block(nn.Module):
    def __init__(self, channels: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(channels, eps=EPSILON)
        self.attn = _Attention(channels, heads)
        self.ln2 = nn.LayerNorm(channels, eps=EPSILON)
        self.ffn = nn.Sequential(
            nn.Linear(channels, mlp_ratio * channels),
            nn.GELU(),
            nn.Linear(mlp_ratio * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.ffn(self.ln2(x))


class _Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> the same."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def positions_side(count: int) -> int:
    """The side of the square that so many positions form, one of which is the class token's.

    Raises:
        ValueError: they form no square.
    """
    side = math.isqrt(max(count - 1, 0))
    if side < 1 or side * side != count - 1:
        raise ValueError(f"{count} positions are no square and a class token")
    return side
