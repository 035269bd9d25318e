"""Combines views of an image, at the network's stride, to labels at full resolution.

Bilinear upsampling is a product with one sparse matrix per axis. So is the mean of windows'
upsampled logits, resized to the labels' size, because the number of windows over a pixel is a
product, too. A band of rows of the result needs only its own rows of these matrices, so K x H x W
values are never in memory at once.

Nor are all windows' logits: each window is computed when the first band needs it and dropped after
the last one, and an image is cut into blocks of columns if even these are too many. What is in
memory then no longer grows with the image. Windows at the edge of two blocks are computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mcibi_fast.nn.bilinear import axis_taps

# Values of a tile: within a core's cache on a CPU, enough to fill a GPU.
_TILE = {"cpu": 2**19}
_LARGE_TILE = 2**24
_PARTS = 8  # a tile is at most this part of K x H x W, however small that is
# Bytes of windows' logits that may be in memory at once.
_KEPT = {"cpu": 2**27}
_LARGE_KEPT = 2**32


class Window:
    """Logits of a part of a view's image, computed when they are needed.

    Args:
        compute: gives (B, h, w, K), contiguous, so that each tap is a whole vector of K numbers.
        top, left: position of the window in the view's image; negative if padding comes first.
        size: (height, width) of the network's input.
    """

    def __init__(
        self, compute: Callable[[], Tensor], top: int, left: int, size: tuple[int, int]
    ) -> None:
        self.top, self.left, self.size = top, left, size
        self.compute = compute
        self._kept: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """Computed now, if they are not in memory."""
        if self._kept is None:
            self._kept = self.compute()
        return self._kept

    def drop(self) -> None:
        """Frees the logits."""
        self._kept = None


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
    def some_logits(self) -> Tensor:
        """Logits (B, h, w, K) of the whole image or of the first window."""
        return self.windows[0].logits if self.logits is None else self.logits

    @property
    def num_classes(self) -> int:
        return self.some_logits.shape[-1]


class AxisTaps(NamedTuple):
    """Output position i of an axis is the sum over t of weight[i, t] * input[source[i, t]]."""

    source: Tensor  # (n, T) int64
    weight: Tensor  # (n, T)


class Piece(NamedTuple):
    """What a window contributes to the output's rows and columns from ``top`` and ``left`` on."""

    window: Window
    top: int
    rows: AxisTaps
    left: int
    columns: AxisTaps

    @property
    def bottom(self) -> int:
        return self.top + len(self.rows.source)

    @property
    def right(self) -> int:
        return self.left + len(self.columns.source)


def label_map(
    views: Sequence[View],
    size: tuple[int, int],
    *,
    align_corners: bool,
    softmax: bool,
    dtype: torch.dtype = torch.int64,
    threshold: float | None = None,
) -> Tensor:
    """The argmax of the views' mean.

    Per view, a whole image's logits are resized to the labels' size at once; windows' logits are
    resized to the windows' sizes, averaged where windows overlap (the sum over the count), and the
    result is resized to the labels' size. Then softmax (or not), mean over the views, and argmax.

    Args:
        views: the views of one batch of images.
        size: (H, W) of the labels.
        align_corners: whether the bilinear resizing aligns corners.
        softmax: average probabilities; the views hold logits.
        dtype: of the result.
        threshold: with softmax, of two classes: the mean probability above which it is class 1.

    Returns:
        (B, H, W), the first class on ties.
    """
    some = views[0].some_logits
    B, K, device = len(some), some.shape[-1], some.device
    sources = [_pieces(view, size, align_corners) for view in views]
    H, W = size
    labels = torch.empty(B, H, W, dtype=dtype, device=device)
    columns = _block_width(sources, W, _KEPT.get(device.type, _LARGE_KEPT))
    rows = max(1, min(_TILE.get(device.type, _LARGE_TILE) // (columns * K), -(-H // _PARTS)))
    for left in range(0, W, columns):
        right = min(left + columns, W)
        for top in range(0, H, rows):
            bottom = min(top + rows, H)
            for b in range(B):
                tiles = (_tile(pieces, b, top, bottom, left, right) for pieces in sources)
                # In a single view, the largest logit has the largest probability.
                tile = _sum(tiles, softmax and len(views) > 1)
                if threshold is not None:  # as a share of the sum of the views' probabilities
                    labels[b, top:bottom, left:right] = tile[..., 1] > threshold * tile.sum(-1)
                else:
                    labels[b, top:bottom, left:right] = tile.argmax(-1)
            for piece in (piece for pieces in sources for piece in pieces):
                if piece.bottom <= bottom:
                    piece.window.drop()
    return labels


def map_of(view: View, *, align_corners: bool) -> Tensor:
    """A whole image's logits (B, K, h, w) as they are; the mean of windows' at the view's size.

    Args:
        view: its windows are computed one after another and dropped.
        align_corners: whether the bilinear resizing aligns corners.
    """
    if view.logits is not None:
        return view.logits.permute(0, 3, 1, 2)
    some = view.some_logits
    dtype = torch.float64 if some.dtype == torch.float64 else torch.float32
    total = some.new_zeros((len(some), *view.size, view.num_classes), dtype=dtype)
    for piece in _pieces(view, view.size, align_corners):
        part = piece.top, piece.bottom, piece.left, piece.right
        for b in range(len(some)):
            total[b, part[0] : part[1], part[2] : part[3]] += _tile([piece], b, *part)
        piece.window.drop()
    return total.permute(0, 3, 1, 2)


def _block_width(sources: Sequence[Sequence[Piece]], width: int, allowed: int) -> int:
    """The number of columns whose windows' logits take up to about ``allowed`` bytes.

    It is at least a window's width, so that most windows are computed once or twice.
    """
    total, least = 0, 1
    for pieces in sources:
        rows = {(piece.top, piece.bottom) for piece in pieces}
        overlapping = max(sum(t <= top < end for t, end in rows) for top, _ in rows)
        across = len({piece.left for piece in pieces})
        if len(pieces) > 1:
            total += overlapping * across * pieces[0].window.logits.nbytes
            least = max(least, *(piece.right - piece.left for piece in pieces))
    blocks = max(1, -(-total // allowed))
    return min(width, max(least, -(-width // blocks)))


def _sum(tiles: Iterator[Tensor], softmax: bool) -> Tensor:
    """The sum of the views' logits or probabilities (n, m, K), one view in memory at a time."""
    total = None
    for tile in tiles:
        if softmax:
            tile = tile.softmax(-1)
        total = tile if total is None else total.add_(tile)
    assert total is not None
    return total


def _tile(pieces: Sequence[Piece], b: int, top: int, bottom: int, left: int, right: int) -> Tensor:
    """A part of a view's logits at full resolution: (bottom - top, right - left, K)."""
    tile: Tensor | None = None
    for piece in pieces:
        first, last = max(top, piece.top), min(bottom, piece.bottom)
        start, end = max(left, piece.left), min(right, piece.right)
        if first >= last or start >= end:
            continue
        logits = piece.window.logits
        if tile is None:
            shape = bottom - top, right - left, logits.shape[-1]
            tile = piece.rows.weight.new_zeros(shape)
        source, weight = (taps[first - piece.top : last - piece.top] for taps in piece.rows)
        # Rows first: there are fewer columns yet.
        band = tile.new_zeros(last - first, *logits.shape[2:])
        for t in range(source.shape[1]):
            rows = logits[b].index_select(0, source[:, t]).to(band.dtype)
            band.addcmul_(rows, weight[:, t, None, None])
        source, weight = (taps[start - piece.left : end - piece.left] for taps in piece.columns)
        part = tile[first - top : last - top, start - left : end - left]
        for t in range(source.shape[1]):
            part.addcmul_(band.index_select(1, source[:, t]), weight[:, t, None])
    assert tile is not None  # the windows cover the image
    return tile


def _pieces(view: View, size: tuple[int, int], align_corners: bool) -> list[Piece]:
    like = view.some_logits
    height, width = like.shape[1:3]
    if view.logits is not None:
        rows, columns = (
            interpolation_taps(n, m, align_corners, like)
            for n, m in zip(size, (height, width), strict=True)
        )
        return [_piece(Window(lambda: like, 0, 0, view.size), rows, columns, like.device)]
    windows = view.windows
    rows_of = _window_taps(
        size[0], view.size[0], windows[0].size[0], height, {w.top for w in windows},
        align_corners, like,
    )  # fmt: skip
    columns_of = _window_taps(
        size[1], view.size[1], windows[0].size[1], width, {w.left for w in windows},
        align_corners, like,
    )  # fmt: skip
    return [_piece(w, rows_of[w.top], columns_of[w.left], like.device) for w in windows]


def _piece(window: Window, rows: AxisTaps, columns: AxisTaps, device: torch.device) -> Piece:
    top, rows = _trimmed(rows)
    left, columns = _trimmed(columns)
    return Piece(
        window,
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
    n: int,
    length: int,
    window: int,
    low: int,
    starts: set[int],
    align_corners: bool,
    like: Tensor,
) -> dict[int, AxisTaps]:
    """Per window of an axis, the taps from its logits through the view's pixels to the outputs.

    Args:
        n: outputs.
        length: pixels of the view.
        window: pixels of a window.
        low: the length of its logits.
        starts: first pixel of each window.
    """
    pixels = torch.arange(length)
    inside = {start: (pixels >= start) & (pixels < start + window) for start in starts}
    count = torch.stack(list(inside.values())).sum(0)
    outer = interpolation_taps(n, length, align_corners, like)
    inner = interpolation_taps(window, low, align_corners, like)
    result = {}
    for start in starts:
        local = (outer.source - start).clamp(0, window - 1)
        share = outer.weight * inside[start][outer.source] / count[outer.source]  # (n, 2)
        result[start] = AxisTaps(
            inner.source[local].flatten(1), (share[..., None] * inner.weight[local]).flatten(1)
        )
    return result
