"""Point-wise spatial attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcibi_fast.nn.blocks import ConvBNReLU, conv_bn_relu
from mcibi_fast.nn.rows import rows, to_map


class PSANet(nn.Module):
    """Point-wise spatial attention network (ECCV 2018), with both of its directions.

    Two :class:`PointAttention` on the map at half its size, a 1x1 convolution of both results, and
    Conv3x3-BN-ReLU on that and the input. As in the released code, the 1x1 convolution has a
    padding of 1, which lets the map grow by 2 before it is resized to the input's size.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of each attention and of the result.
        mask_size: height and width of the window of offsets for which attention is predicted; odd.
        shrink_factor: the attention runs on a map that is smaller by this factor. If neither side
            is a multiple of it, a side n becomes (n - 1) // factor + 1 and resizing aligns corners,
            there and back; otherwise it becomes n // factor (at least 1) and does not.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w). Allocates 2 B N^2 weights, where N is
    the number of pixels of the smaller map: the method predicts each of them.

    Raises:
        ValueError: an even ``mask_size``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        mask_size: tuple[int, int] = (97, 97),
        shrink_factor: int = 2,
    ) -> None:
        super().__init__()
        self.collect, self.distribute = (
            PointAttention(in_channels, out_channels, mask_size, distribute=direction)
            for direction in (False, True)
        )
        self.project = ConvBNReLU(
            nn.Conv2d(2 * out_channels, in_channels, 1, padding=1, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
        )
        self.fuse = conv_bn_relu(2 * in_channels, out_channels, 3)
        self.shrink_factor = shrink_factor

    def forward(self, features: Tensor) -> Tensor:
        size, factor = features.shape[2:], self.shrink_factor
        align_corners = factor != 1 and all(side % factor for side in size)
        if align_corners:
            small = [(side - 1) // factor + 1 for side in size]
        else:
            small = [max(side // factor, 1) for side in size]
        contexts = [
            part(features, small, align_corners) for part in (self.collect, self.distribute)
        ]
        context = F.interpolate(
            self.project(torch.cat(contexts, dim=1)),
            size,
            mode="bilinear",
            align_corners=align_corners,
        )
        return self.fuse(torch.cat([features, context], dim=1))


class PointAttention(nn.Module):
    """sum_j softmax_j(a_ij) x_j over all pixels j, with weights predicted for pairs of positions.

    Every pixel predicts one number for each offset of a window. "Collect": a_ij is what pixel i
    predicts for the offset from itself to j. "Distribute": a_ij is what pixel j predicts for the
    offset to i. Offsets outside the window have a_ij = 0, which still counts in the softmax.

    Args:
        in_channels: channels of the input.
        out_channels: channels of x and of the result.
        mask_size: height and width of the window; odd.
        distribute: the direction.

    Shape: (B, in_channels, h, w) -> (B, out_channels, *size).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mask_size: tuple[int, int] = (97, 97),
        *,
        distribute: bool,
    ) -> None:
        super().__init__()
        if not all(side % 2 for side in mask_size):
            raise ValueError(f"mask_size: expected two odd numbers, got {mask_size}")
        self.reduce = conv_bn_relu(in_channels, out_channels, 1)
        self.attention = nn.Sequential(
            *conv_bn_relu(out_channels, out_channels, 1),
            nn.Conv2d(out_channels, mask_size[0] * mask_size[1], 1, bias=False),
        )
        self.mask_size = mask_size
        self.distribute = distribute

    def forward(self, features: Tensor, size: list[int], align_corners: bool) -> Tensor:
        x = self.reduce(features)
        if x.shape[2:] != torch.Size(size):
            x = F.interpolate(x, size, mode="bilinear", align_corners=align_corners)
        scores = self._scores(x)  # (B, N, N): predicting pixel, other pixel
        if self.distribute:
            scores = scores.mT  # now the second pixel is the source in both directions
        return to_map(scores.softmax(dim=2) @ rows(x), x)

    def _scores(self, x: Tensor) -> Tensor:
        *hidden, last = self.attention
        for layer in hidden:
            x = layer(x)
        return relative_scores(x, last, self.mask_size)


def relative_scores(x: Tensor, conv: Any, mask_size: tuple[int, int]) -> Tensor:
    """What every pixel predicts for every pixel (B, N, N), 0 outside the window.

    Only the offsets that occur in this map are computed: of a window of 97 x 97 a map of 33 x 33
    needs less than half.

    Args:
        x: (B, C, h, w).
        conv: a 1x1 convolution without bias to the offsets, (rows, columns) flattened.
        mask_size: the window.
    """
    (h, ys), (w, xs) = (
        (side, min(side, window // 2 + 1))  # offsets -(ys - 1) to ys - 1
        for side, window in zip(x.shape[2:], mask_size, strict=True)
    )
    top, left = mask_size[0] // 2 - (ys - 1), mask_size[1] // 2 - (xs - 1)
    weight = conv.weight.unflatten(0, mask_size)
    weight = weight[top : top + 2 * ys - 1, left : left + 2 * xs - 1].flatten(0, 1)
    predicted = rows(F.conv2d(x, weight))  # (B, N, offsets)
    dy, inside_y = _offsets(h, ys, x.device)
    dx, inside_x = _offsets(w, xs, x.device)
    index = dy[:, None, :, None] * (2 * xs - 1) + dx[None, :, None, :]  # (h, w, h, w)
    inside = inside_y[:, None, :, None] & inside_x[None, :, None, :]
    index, inside = (t.reshape(1, h * w, h * w) for t in (index, inside))
    scores = predicted.gather(2, index.expand(x.shape[0], -1, -1))
    return scores if ys == h and xs == w else scores.where(inside, 0)


def _offsets(side: int, reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index of the offset from each position to each other (side, side), and whether it exists."""
    at = torch.arange(side, device=device)
    offset = at[None, :] - at[:, None] + reach - 1
    return offset.clamp(0, 2 * reach - 2), (offset >= 0) & (offset <= 2 * reach - 2)
