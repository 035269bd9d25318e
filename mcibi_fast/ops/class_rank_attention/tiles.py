"""How the kernels of class_rank_attention are cut up, by dtype, number of classes and device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mcibi_fast.ops.triton_attention import Tile, width


class Tiles(NamedTuple):
    """Tiles, from large to small, of each kernel."""

    forward: tuple[Tile, ...]
    query: tuple[Tile, ...]  # dQ
    weights: tuple[Tile, ...]  # dW


# bfloat16 and float16, by classes and shared memory a block may have (KiB), as in
# ``confidence_attention/tiles.py``. Each fits and compiles without spilling registers.
SIXTEEN_BITS: dict[int, dict[int, Tiles]] = {
    64: {
        99: Tiles(
            forward=(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
            query=(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
            weights=(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        ),
    },
    128: {
        227: Tiles(
            forward=(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
            query=(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
            weights=(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        ),
        99: Tiles(
            forward=(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
            query=(Tile(64, 64, 8, 2),),
            weights=(Tile(64, 64, 8, 2),),
        ),
    },
    192: {  # in two parts, see ``blocks``
        227: Tiles(
            forward=(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
            query=(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
            weights=(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
        ),
    },
    256: {
        227: Tiles(
            forward=(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
            query=(Tile(128, 32, 8, 2), Tile(64, 16, 4, 2)),
            weights=(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
        ),
        163: Tiles(
            forward=(Tile(64, 64, 8, 2),),
            query=(Tile(64, 64, 8, 2),),
            weights=(Tile(64, 64, 8, 2),),
        ),
        99: Tiles(
            forward=(Tile(64, 64, 8, 1),),
            query=(Tile(32, 64, 8, 1),),
            weights=(Tile(32, 64, 8, 1),),
        ),
    },
}
# float32 on any device: without tensor cores, since TF32 would miss the precision.
FLOAT32 = {
    64: Tiles(*((Tile(32, 32, 4, 1),),) * 3),
    256: Tiles(*((Tile(32, 16, 8, 1, 32),),) * 3),
}


def tiles(dtype: torch.dtype, classes: int, shared_memory: int) -> Tiles:
    """The tiles for K classes (at most 256).

    Args:
        dtype: of the query and the weights.
        classes: K.
        shared_memory: what a block may have on the device, bytes.
    """
    if dtype == torch.float32:
        return FLOAT32[min(columns for columns in FLOAT32 if classes <= columns)]
    fitting = (
        (columns, -kib)
        for columns, by_memory in SIXTEEN_BITS.items()
        for kib in by_memory
        if classes <= columns and kib * 1024 <= shared_memory
    )
    columns, kib = min(fitting)
    return SIXTEEN_BITS[columns][-kib]


def blocks(dtype: torch.dtype, classes: int, shared_memory: int) -> tuple[int, int]:
    """The columns of a tile that holds so many classes, and those of its second part, if any.

    Products need powers of two. From 129 to 192 classes those of two parts are 128 and the rest:
    150 classes take 160 columns instead of 256. In 16 bits only with WGMMA: the warps of older GPUs
    share the columns, and with two parts spill hundreds of bytes. Up to 128 classes, and above 192,
    a second part would save little.

    Args:
        dtype: of the query and the weights.
        classes: K in the inputs' memory.
        shared_memory: what a block may have on the device, bytes.
    """
    parts = dtype == torch.float32 or shared_memory >= 227 * 1024
    if parts and 128 < classes <= 192:
        return 128, width(classes - 128)
    return width(classes), 0
