"""Draws labels and predictions: in colour, as overlays, in grids with captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Pixels = NDArray[np.uint8]

_PAPER = (255, 255, 255)
_INK = (40, 42, 48)
_FAINT = (92, 101, 112)
_UNLABELLED = (236, 236, 236)
_GAP = 6
_BAND = 2**18  # pixels that are coloured at once


def to_pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """Undoes the normalisation: (3, H, W) float -> (H, W, 3) uint8."""
    rgb = image.detach().float().cpu().numpy().transpose(1, 2, 0)
    rgb = rgb * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)


def colourise(label: ArrayLike, palette: Pixels) -> Pixels:
    """Class indices (H, W) -> colours (H, W, 3) uint8; values that are no class are pale grey."""
    table = np.concatenate([palette, np.array([_UNLABELLED], np.uint8)])
    return table[_rows(label, len(palette))]


def blend(
    image: Pixels,
    label: ArrayLike,
    palette: Pixels,
    alpha: float = 0.55,
    *,
    out: Pixels | None = None,
) -> Pixels:
    """The image with classes in colour on top, with opacity ``alpha``.

    Unlabelled pixels keep the image's colour. The result is written to ``out``, which may be the
    image itself, or else to a new array. Takes ``image`` (H, W, 3) uint8 and ``label`` (H, W);
    raises ValueError if their sizes differ.
    """
    label = np.asarray(label)
    if image.shape[:2] != label.shape:
        raise ValueError(f"label: size {label.shape} differs from the image's, {image.shape[:2]}")
    # (K + 1, 256, 3): the result for each class and colour of the image.
    under = np.arange(256.0)[:, None]
    table = np.empty((len(palette) + 1, 256, 3), np.uint8)
    table[:-1] = under + alpha * (palette[:, None] - under) + 0.5
    table[-1] = under
    mixed = np.empty(image.shape, np.uint8) if out is None else out
    rows = max(1, _BAND // image.shape[1])
    for top in range(0, len(label), rows):
        band = slice(top, top + rows)
        index = _rows(label[band], len(palette))[..., None]
        mixed[band] = table[index, image[band], np.arange(3)]
    return mixed


def indexed(label: ArrayLike, palette: Pixels) -> Image.Image:
    """Class indices (H, W) in 0..255 -> a palette image; a PNG of it stores the indices."""
    picture = Image.fromarray(np.asarray(label).astype(np.uint8))
    table = np.full((256, 3), _UNLABELLED, np.uint8)
    table[: len(palette)] = palette
    picture.putpalette(table.tobytes())
    return picture


def mark(picture: Pixels, where: NDArray[np.bool_]) -> Pixels:
    """Hatches the pixels ``where`` (H, W) of a picture (H, W, 3) uint8 with dark diagonal lines."""
    rows, columns = np.indices(where.shape)
    lines = (rows + columns) % 8 < 3
    return np.where((where & lines)[..., None], np.array(_INK, np.uint8), picture)


def fit(picture: Pixels, width: int, *, smooth: bool) -> Pixels:
    """A picture (H, W, 3) or map (H, W), uint8, resized to a width of about ``width``.

    Smaller ones are enlarged by a whole factor, each pixel becoming a square, so that they stay
    sharp.

    Args:
        picture: the picture to resize.
        width: width in pixels.
        smooth: shrink larger ones by averaging (photographs) instead of taking the nearest pixel
            (colours of classes).
    """
    H, W = picture.shape[:2]
    if width >= W:
        factor = round(width / W)
        return picture.repeat(factor, 0).repeat(factor, 1)
    resampling = Image.Resampling.BOX if smooth else Image.Resampling.NEAREST
    size = (width, max(1, round(H * width / W)))
    return np.asarray(Image.fromarray(picture).resize(size, resampling))


def grid(
    rows: Sequence[Sequence[Pixels]],
    *,
    columns: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    notes: Sequence[Sequence[str]] | None = None,
    title: str = "",
    footer: Sequence[Image.Image] = (),
    font_size: int = 10,
) -> Image.Image:
    """A grid of pictures: each entry of ``rows`` is a row.

    Raises ValueError if the numbers of headings, captions or notes do not fit.

    Args:
        rows: pictures (H, W, 3) uint8, of any sizes.
        columns: a heading for each column; long ones are broken into lines.
        captions: a caption below each row.
        notes: a line below each picture.
        title: a line above everything.
        footer: pictures below all rows, such as a legend.
        font_size: size of the font in pixels.
    """
    across = max((len(row) for row in rows), default=0)
    if across == 0:
        raise ValueError("rows: no pictures")
    if columns is not None and len(columns) != across:
        raise ValueError(f"columns: {len(columns)} headings for {across} columns")
    if captions is not None and len(captions) != len(rows):
        raise ValueError(f"captions: {len(captions)} captions for {len(rows)} rows")
    if notes is not None and [len(line) for line in notes] != [len(row) for row in rows]:
        raise ValueError("notes: expected one for each picture")
    font = ImageFont.load_default(font_size)
    line = 2 * font_size
    widths = [max(row[i].shape[1] for row in rows if i < len(row)) for i in range(across)]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    headings = [wrapped(text, font, w) for text, w in zip(columns or (), widths, strict=False)]
    headline = round(1.3 * line) if title else 0
    header = headline + max((len(lines) for lines in headings), default=0) * line
    noted = [notes is not None and any(notes[i]) for i in range(len(rows))]
    belows = [line * ((captions is not None) + has) for has in noted]
    size = (
        max(
            sum(widths) + _GAP * (across + 1), *(picture.width + 2 * _GAP for picture in footer), 0
        ),
        header
        + sum(heights)
        + sum(belows)
        + _GAP * len(rows)
        + sum(picture.height + _GAP for picture in footer)
        + _GAP,
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = [_GAP + sum(widths[:i]) + _GAP * i for i in range(across)]
    draw.text((_GAP, _GAP), title, fill=_INK, font=ImageFont.load_default(1.2 * font_size))
    for left, lines in zip(lefts, headings, strict=False):
        draw.text((left, _GAP + headline), "\n".join(lines), fill=_INK, font=font)
    top = _GAP + header
    for i, (row, below) in enumerate(zip(rows, belows, strict=True)):
        for j, (left, picture) in enumerate(zip(lefts, row, strict=False)):
            sheet.paste(Image.fromarray(picture), (left, top))
            if notes is not None:
                text = wrapped(notes[i][j], font, widths[j])[0]
                draw.text((left, top + heights[i] + 3), text, fill=_FAINT, font=font)
        if captions is not None:
            bottom = top + heights[i] + below - line
            draw.text((_GAP, bottom + 3), captions[i], fill=_INK, font=font)
        top += heights[i] + below + _GAP
    for strip in footer:
        sheet.paste(strip, (_GAP, top))
        top += strip.height + _GAP
    return sheet


def legend(
    classes: Sequence[str],
    palette: Pixels,
    *,
    columns: int = 6,
    width: int | None = None,
    mistaken: bool = False,
    font_size: int = 10,
) -> Image.Image:
    """The classes' names beside their colours.

    Args:
        classes: names.
        palette: a colour (3,) uint8 for each.
        columns: the largest number of columns.
        width: width in pixels; if given, it decides the number of columns instead.
        mistaken: also explain the hatching of `mark` and the colour of unlabelled pixels.
        font_size: size of the font in pixels.
    """
    font = ImageFont.load_default(font_size)
    line = 2 * font_size
    box = np.empty((round(1.2 * font_size), 2 * font_size, 3), np.uint8)
    entries = [
        (name, np.full_like(box, colour)) for name, colour in zip(classes, palette, strict=True)
    ]
    if mistaken:
        hatched = mark(np.full_like(box, 215), np.ones(box.shape[:2], bool))
        entries += [("mistaken", hatched), ("unlabelled", np.full_like(box, _UNLABELLED))]
    names = max((int(font.getlength(name)) for name, _ in entries), default=0)
    cell = names + box.shape[1] + round(1.6 * font_size)
    if width is not None:
        columns = max(1, width // cell)
    rows = -(-len(entries) // columns)
    size = (cell * min(columns, len(entries)) + _GAP, line * rows + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (name, picture) in enumerate(entries):
        x, y = _GAP + cell * (i % columns), _GAP + line * (i // columns)
        sheet.paste(Image.fromarray(picture), (x, y))
        draw.text((x + box.shape[1] + font_size // 2, y), name, fill=_INK, font=font)
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines of at most ``width`` pixels; a word longer than that ends in dots."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width and len(word) > 2:
            word = word.rstrip("…")[:-1] + "…"
        lines.append(word)
    return lines or [""]


def _rows(label: ArrayLike, num_classes: int) -> NDArray[np.integer]:
    """The palette row of each pixel; row ``num_classes`` stands for every other value."""
    values = np.asarray(label)
    other = (values < 0) | (values >= num_classes)
    return np.where(other, num_classes, values.astype(np.int32))
