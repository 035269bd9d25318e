"""Swin as the released checkpoints need it; its modules have the names used in the checkpoints.

It differs from timm's in three points. Maps are padded to whole windows before they are shifted
(timm shifts first, which gives other neighbours at sizes that need padding); windows shift even if
the map is a single window; and each stage ends with its own downsampling, whose channels are in the
order of ``nn.Unfold``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import Tensor, nn

from mcibi_fast.models.checkpointing import Checkpointed

MASKED = -100.0  # added to the logits between regions that the cyclic shift brought together


class Swin(nn.Module):
    """Images (B, 3, H, W) of any size -> four normalised maps, of strides 4, 8, 16 and 32.

    Args:
        width: channels of the first map; each stage doubles them.
        depths: number of blocks in each stage; every second one shifts its windows.
        heads: number of attention heads in each stage.
        window_size: side of a window.
        mlp_ratio: hidden channels of a feed-forward layer divided by its input channels.
        patch_size: stride of the first map.
    """

    def __init__(
        self,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window_size: int,
        *,
        mlp_ratio: int = 4,
        patch_size: int = 4,
    ) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(len(depths))]
        self.patch_embed = _PatchEmbedding(width, patch_size)
        self.stages = nn.ModuleList()
        for i, channels in enumerate(widths):
            last = i == len(widths) - 1
            stage = _Stage(channels, depths[i], heads[i], window_size, mlp_ratio, not last)
            self.stages.append(stage)
            self.add_module(f"norm{i}", nn.LayerNorm(channels))
        self.feature_info = FeatureInfo(
            [
                {"num_chs": channels, "reduction": patch_size * 2**i, "module": f"stages.{i}"}
                for i, channels in enumerate(widths)
            ],
            tuple(range(len(widths))),
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's: whether training computes the blocks again in the backward pass."""
        for stage in cast(Iterable[Checkpointed], self.stages):
            stage.gradient_checkpointing = enable

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patch_embed(images)
        maps = []
        for i, stage in enumerate(self.stages):
            x, before_downsampling = stage(x)
            normalised = self.get_submodule(f"norm{i}")(before_downsampling)
            maps.append(normalised.permute(0, 3, 1, 2))
        return maps


class _PatchEmbedding(nn.Module):
    def __init__(self, channels: int, patch_size: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, channels, patch_size, patch_size)
        self.norm = nn.LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, C)."""
        height, width = images.shape[2:]
        patch = self.projection.stride
        images = F.pad(images, (0, -width % patch[1], 0, -height % patch[0]))
        return self.norm(self.projection(images).permute(0, 2, 3, 1))


class _Stage(Checkpointed):
    def __init__(
        self,
        channels: int,
        depth: int,
        heads: int,
        window_size: int,
        mlp_ratio: int,
        downsample: bool,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.blocks = nn.ModuleList(
            _Block(channels, heads, window_size, mlp_ratio, shifted=bool(j % 2))
            for j in range(depth)
        )
        self.downsample = _PatchMerging(channels) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, w, C) -> the next stage's input and this stage's output."""
        mask = region_mask(x, self.window_size)  # the same in all blocks
        for block in self.blocks:
            x = self._run(block, x, mask)
        return self.downsample(x), x


class _PatchMerging(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, ceil(h/2), ceil(w/2), 2C)."""
        x = _partition(_pad_to_windows(x, 2), 2)  # (B, h/2, w/2, 4, C)
        return self.reduction(self.norm(x.transpose(3, 4).flatten(3)))


class _Block(nn.Module):
    def __init__(
        self, channels: int, heads: int, window_size: int, mlp_ratio: int, *, shifted: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = _ShiftedWindows(channels, heads, window_size, shifted)
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = _FeedForward(channels, mlp_ratio * channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.ffn(self.norm2(x))


class _FeedForward(nn.Module):
    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(channels, hidden_channels), nn.GELU()),
            nn.Linear(hidden_channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _ShiftedWindows(nn.Module):
    def __init__(self, channels: int, heads: int, window_size: int, shifted: bool) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift = window_size // 2 if shifted else 0
        self.w_msa = _WindowAttention(channels, heads, window_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, h, w, C) -> the same; ``mask`` comes from :func:`region_mask`."""
        height, width = x.shape[1:3]
        x = _pad_to_windows(x, self.window_size)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = _partition(x, self.window_size)
        attended = self.w_msa(windows.flatten(1, 2), mask if self.shift else None)
        x = _merge(attended.view(windows.shape), self.window_size)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return x[:, :height, :width]


class _WindowAttention(nn.Module):
    """Attention within windows of N = window_size^2 positions, biased by relative position."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window_size: int) -> None:
        super().__init__()
        self.heads = heads
        span = 2 * window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(span * span, heads))
        # A buffer because the checkpoints contain it, although it follows from the window's size.
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.window_size = window_size
        self.reset_parameters()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets what is not in a submodule as after ``__init__``."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.relative_position_index.copy_(relative_position_index(self.window_size))

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """(B, W, N, C) -> (B, W, N, C); the mask (W, N, N) is added to the attention's logits."""
        batch, count, positions, _ = windows.shape
        heads = self.qkv(windows).view(batch, count, positions, 3, self.heads, -1)
        q, k, v = heads.permute(3, 0, 1, 4, 2, 5)  # each (B, W, heads, N, C / heads)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        # Four dimensions for the fused kernels, merged so that the bias broadcasts over the first.
        if mask is None:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        else:
            q, k, v = (t.flatten(1, 2) for t in (q, k, v))
            bias = (mask[:, None] + bias).flatten(0, 1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
        attended = attended.view(batch, count, self.heads, positions, -1)
        return self.proj(attended.transpose(2, 3).flatten(3))


def relative_position_index(window_size: int) -> Tensor:
    """(N, N): for positions i (row) and j (column), the row of the bias table for their offset."""
    i = torch.arange(window_size)
    offset = i[:, None] - i[None, :] + window_size - 1  # (M, M), from 0
    rows = offset[:, None, :, None] * (2 * window_size - 1)
    return (rows + offset[None, :, None, :]).reshape(window_size**2, window_size**2)


def region_mask(x: Tensor, window_size: int) -> Tensor:
    """What shifted windows add to their attention's logits, for x (B, h, w, C): (W, N, N).

    After padding to whole windows and rolling by half a window, the last window of each row and
    column contains two regions that are not neighbours in the image.
    """

    def regions(size: int) -> Tensor:
        return torch.arange(size, device=x.device) >= size - window_size // 2

    height, width = (size + -size % window_size for size in x.shape[1:3])
    labels = 2 * regions(height).long()[:, None] + regions(width).long()[None, :]
    windows = _partition(labels[None, :, :, None], window_size).flatten(0, 2).squeeze(-1)
    different = windows[:, :, None] != windows[:, None, :]
    return torch.zeros_like(different, dtype=x.dtype).masked_fill_(different, MASKED)


def _pad_to_windows(x: Tensor, window_size: int) -> Tensor:
    """(B, h, w, C), padded with zeros below and on the right."""
    height, width = x.shape[1:3]
    return F.pad(x, (0, 0, 0, -width % window_size, 0, -height % window_size))


def _partition(x: Tensor, window_size: int) -> Tensor:
    """(B, h, w, C) -> (B, h / M, w / M, N, C)."""
    x = x.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size))
    return x.transpose(2, 3).flatten(3, 4)


def _merge(windows: Tensor, window_size: int) -> Tensor:
    """The inverse of :func:`_partition`."""
    x = windows.unflatten(3, (window_size, window_size)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)
