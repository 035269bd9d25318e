"""Combines views of an image, at the network's stride, to labels at full resolution.

Bilinear upsampling is a product with one sparse matrix per axis. So is the mean of windows'
upsampled logits, resized to the labels' size, because the number of windows over a pixel is a
product, too. A band of rows of the result needs only its own rows of these matrices, so K x H x W
values are never in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mcibi_fast.nn.bilinear import axis_taps

# Values of a tile: within a core's cache on a CPU, enough to fill a GPU.
_TILE = {"cpu": 2**19}
_LARGE_TILE = 2**24
_PARTS = 8  # a tile is at most this part of K x H x W, however small that is


class Window(NamedTuple):
    """Logits of a part of a view's image.

    Attributes:
        logits: (B, h, w, K), contiguous, so that each tap is a whole vector of K numbers.
        top, left: position of the window in the view's image; negative if padding comes first.
        size: (height, width) of the network's input.
    """

    logits: Tensor
    top: int
    left: int
    size: tuple[int, int]


class View(NamedTuple):
    """One scale of an image, upright or mirrored back.

    Attributes:
        size: (height, width) of the view's image, without padding.
        windows: a grid that covers it; None for the whole of it.
        logits: (B, h, w, K) of the whole image, None for windows.
    """

    size: tuple[int, int]
    windows: Sequence[Window] = ()
    logits: Tensor | None = None

    @property
    def num_classes(self) -> int:
        return (self.windows[0].logits if self.logits is None else self.logits).shape[-1]


class AxisTaps(NamedTuple):
    """Output position i of an axis is the sum over t of weight[i, t] * input[source[i, t]]."""

    source: Tensor  # (n, T) int64
    weight: Tensor  # (n, T)


class Piece(NamedTuple):
    """What a window contributes to the output's rows and columns from ``top`` and ``left`` on."""

    logits: Tensor  # (B, h, w, K)
    top: int
    rows: AxisTaps
    left: int
    columns: AxisTaps


def label_map(
    views: Sequence[View], size: tuple[int, int], *, align_corners: bool, softmax: bool
) -> Tensor:
    """The argmax of the views' mean probabilities.

    Per view, a whole image's logits are resized to the labels' size at once; windows' logits are
    resized to the windows' sizes, averaged where windows overlap (the sum over the count), and the
    result is resized to the labels' size. Then softmax, mean over the views, and argmax.

    Args:
        views: the views of one batch of images.
        size: (H, W) of the labels.
        align_corners: whether the bilinear resizing aligns corners.
        softmax: take it; the views hold logits, not probabilities.

    Returns:
        (B, H, W) int64, the first class on ties.
    """
    sources = [_pieces(view, size, align_corners) for view in views]
    some = sources[0][0].logits
    B, K = len(some), some.shape[-1]
    H, W = size
    rows = max(1, min(_TILE.get(some.device.type, _LARGE_TILE) // (W * K), -(-H // _PARTS)))
    labels = torch.empty(B, H, W, dtype=torch.int64, device=some.device)
    for b in range(B):
        for top in range(0, H, rows):
            bottom = min(top + rows, H)
            tiles = (_tile(pieces, b, top, bottom, W) for pieces in sources)
            # In a single view, the largest logit has the largest probability.
            labels[b, top:bottom] = _sum(tiles, softmax and len(views) > 1).argmax(-1)
    return labels


def _sum(tiles: Iterator[Tensor], softmax: bool) -> Tensor:
    """The sum of the views' logits or probabilities (rows, W, K), one view in memory at a time."""
    total = None
    for tile in tiles:
        if softmax:
            tile = tile.softmax(-1)
        total = tile if total is None else total.add_(tile)
    assert total is not None
    return total


def _tile(pieces: Sequence[Piece], b: int, top: int, bottom: int, width: int) -> Tensor:
    """Rows ``top`` to ``bottom`` of a view's logits at full resolution: (rows, W, K)."""
    some = pieces[0]
    tile = some.rows.weight.new_zeros(bottom - top, width, some.logits.shape[-1])
    for piece in pieces:
        first = max(top, piece.top)
        last = min(bottom, piece.top + len(piece.rows.source))
        if first >= last:
            continue
        source, weight = (taps[first - piece.top : last - piece.top] for taps in piece.rows)
        # Rows first: there are fewer columns yet.
        band = tile.new_zeros(last - first, *piece.logits.shape[2:])
        for t in range(source.shape[1]):
            rows = piece.logits[b].index_select(0, source[:, t]).to(band.dtype)
            band.addcmul_(rows, weight[:, t, None, None])
        source, weight = piece.columns
        part = tile[first - top : last - top, piece.left : piece.left + len(source)]
        for t in range(source.shape[1]):
            part.addcmul_(band.index_select(1, source[:, t]), weight[:, t, None])
    return tile


def _pieces(view: View, size: tuple[int, int], align_corners: bool) -> list[Piece]:
    if view.logits is not None:
        rows, columns = (
            interpolation_taps(n, m, align_corners, view.logits)
            for n, m in zip(size, view.logits.shape[1:3], strict=True)
        )
        return [_piece(view.logits, rows, columns)]
    tops = {window.top: window.logits.shape[1] for window in view.windows}
    lefts = {window.left: window.logits.shape[2] for window in view.windows}
    height, width = view.windows[0].size
    some = view.windows[0].logits
    rows_of = _window_taps(size[0], view.size[0], height, tops, align_corners, some)
    columns_of = _window_taps(size[1], view.size[1], width, lefts, align_corners, some)
    return [
        _piece(window.logits, rows_of[window.top], columns_of[window.left])
        for window in view.windows
    ]


def _piece(logits: Tensor, rows: AxisTaps, columns: AxisTaps) -> Piece:
    top, rows = _trimmed(rows)
    left, columns = _trimmed(columns)
    device = logits.device
    return Piece(
        logits,
        top,
        AxisTaps(*(t.to(device, non_blocking=True) for t in rows)),
        left,
        AxisTaps(*(t.to(device, non_blocking=True) for t in columns)),
    )


def _trimmed(taps: AxisTaps) -> tuple[int, AxisTaps]:
    """The taps without positions at either end that read nothing, and the first position kept."""
    used = taps.weight != 0
    positions = used.any(1).nonzero()[:, 0]
    if not len(positions):  # so few labels that none of them reads from this window
        return 0, AxisTaps(taps.source[:0], taps.weight[:0])
    first, last = int(positions[0]), int(positions[-1]) + 1
    kept = used.any(0)
    return first, AxisTaps(taps.source[first:last, kept], taps.weight[first:last, kept])


def interpolation_taps(n: int, m: int, align_corners: bool, like: Tensor) -> AxisTaps:
    """``F.interpolate``'s two taps per output position, from m inputs to n outputs, on the host.

    Args:
        n, m: output and input lengths.
        align_corners: as in ``F.interpolate``.
        like: gives the dtype of the weights, which is at least float32, as there.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    source, weight = axis_taps(m, n, align_corners, dtype)
    return AxisTaps(source.T, weight.T)


def _window_taps(
    n: int, length: int, window: int, starts: dict[int, int], align_corners: bool, like: Tensor
) -> dict[int, AxisTaps]:
    """Per window of an axis, the taps from its logits through the view's pixels to the outputs.

    Args:
        n: outputs.
        length: pixels of the view.
        window: pixels of a window.
        starts: first pixel of each window, and the length of its logits.
    """
    pixels = torch.arange(length)
    inside = {start: (pixels >= start) & (pixels < start + window) for start in starts}
    count = torch.stack(list(inside.values())).sum(0)
    outer = interpolation_taps(n, length, align_corners, like)
    result = {}
    for start, low in starts.items():
        inner = interpolation_taps(window, low, align_corners, like)
        local = (outer.source - start).clamp(0, window - 1)
        share = outer.weight * inside[start][outer.source] / count[outer.source]  # (n, 2)
        result[start] = AxisTaps(
            inner.source[local].flatten(1), (share[..., None] * inner.weight[local]).flatten(1)
        )
    return result
