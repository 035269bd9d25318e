"""Pictures of labels and predictions: colours, overlays, captioned grids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Pixels = NDArray[np.uint8]

_PAPER = (255, 255, 255)
_INK = (40, 42, 48)
_UNLABELLED = (236, 236, 236)
_GAP = 6
_LINE = 20


def to_pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """Undo the normalisation: (3, H, W) float -> (H, W, 3) uint8."""
    rgb = image.detach().float().cpu().numpy().transpose(1, 2, 0)
    rgb = rgb * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)


def colourise(label: ArrayLike, palette: Pixels) -> Pixels:
    """Class indices (H, W) -> colours (H, W, 3) uint8; pale grey for what is no class."""
    table = np.concatenate([palette, np.array([_UNLABELLED], np.uint8)])
    return table[_rows(label, len(palette))]


def blend(image: Pixels, label: ArrayLike, palette: Pixels, alpha: float = 0.55) -> Pixels:
    """Classes in colour over the image, ``alpha`` opaque; unlabelled pixels stay as they are.

    ``image`` (H, W, 3) uint8 and ``label`` (H, W); raises ValueError when their sizes differ.
    """
    rows = _rows(label, len(palette))
    if image.shape[:2] != rows.shape:
        raise ValueError(f"label: size {rows.shape} differs from the image's, {image.shape[:2]}")
    amount = np.where(rows < len(palette), alpha, 0.0)[..., None]
    mixed = image + amount * (colourise(label, palette).astype(np.float64) - image)
    return (mixed + 0.5).astype(np.uint8)


def indexed(label: ArrayLike, palette: Pixels) -> Image.Image:
    """Class indices (H, W) in 0..255 -> a palette image: saved as PNG it holds the indices."""
    picture = Image.fromarray(np.asarray(label).astype(np.uint8))
    table = np.full((256, 3), _UNLABELLED, np.uint8)
    table[: len(palette)] = palette
    picture.putpalette(table.tobytes())
    return picture


def grid(
    rows: Sequence[Sequence[Pixels]],
    *,
    columns: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Pictures side by side: one row per entry, a heading per column, a caption under each row.

    ``rows``: pictures (H, W, 3) uint8, of any sizes. Raises ValueError when the numbers of
    headings or captions do not fit.
    """
    across = max((len(row) for row in rows), default=0)
    if across == 0:
        raise ValueError("rows: no pictures")
    if columns is not None and len(columns) != across:
        raise ValueError(f"columns: {len(columns)} headings for {across} columns")
    if captions is not None and len(captions) != len(rows):
        raise ValueError(f"captions: {len(captions)} captions for {len(rows)} rows")
    widths = [max(row[i].shape[1] for row in rows if i < len(row)) for i in range(across)]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    header = _LINE if columns is not None else 0
    footer = _LINE if captions is not None else 0
    size = (
        sum(widths) + _GAP * (across + 1),
        header + sum(heights) + (footer + _GAP) * len(rows) + _GAP,
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    lefts = [_GAP + sum(widths[:i]) + _GAP * i for i in range(across)]
    for left, heading in zip(lefts, columns or (), strict=False):
        draw.text((left, _GAP), heading, fill=_INK, font=font)
    top = _GAP + header
    for i, row in enumerate(rows):
        for left, picture in zip(lefts, row, strict=False):
            sheet.paste(Image.fromarray(picture), (left, top))
        if captions is not None:
            draw.text((_GAP, top + heights[i] + 3), captions[i], fill=_INK, font=font)
        top += heights[i] + footer + _GAP
    return sheet


def legend(classes: Sequence[str], palette: Pixels, *, columns: int = 6) -> Image.Image:
    """The classes' names beside their colours."""
    font = ImageFont.load_default()
    cell = max((int(font.getlength(name)) for name in classes), default=0) + 34
    lines = -(-len(classes) // columns)
    size = (cell * min(columns, len(classes)) + _GAP, _LINE * lines + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(classes):
        x, y = _GAP + cell * (i % columns), _GAP + _LINE * (i // columns)
        draw.rectangle((x, y, x + 18, y + 12), fill=tuple(int(c) for c in palette[i]))
        draw.text((x + 24, y), name, fill=_INK, font=font)
    return sheet


def _rows(label: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """The palette row of each pixel; row ``num_classes`` stands for every other value."""
    values = np.asarray(label).astype(np.int64)
    return np.where((values >= 0) & (values < num_classes), values, num_classes)
