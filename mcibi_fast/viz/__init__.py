"""Colours of classes, overlays on images, and grids of pictures with captions."""

from __future__ import annotations

from mcibi_fast.extras import require

require("mcibi_fast.viz", "PIL")

from mcibi_fast.viz.overlay import blend, colourise, grid, indexed, legend, to_pixels
from mcibi_fast.viz.palette import distinct_palette, voc_palette

__all__ = [
    "blend",
    "colourise",
    "distinct_palette",
    "grid",
    "indexed",
    "legend",
    "to_pixels",
    "voc_palette",
]
