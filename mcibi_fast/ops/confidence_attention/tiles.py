"""How the kernels of confidence_attention are cut up, by dtype, head dimension and device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mcibi_fast.ops.triton_attention import Tile


class Tiles(NamedTuple):
    """Tiles, from large to small, of the kernels that form S alone and of those with dP too."""

    scores: tuple[Tile, ...]  # forward, dV
    both: tuple[Tile, ...]  # dQ, dK


# bfloat16 and float16, by head dimension and shared memory a block may have (KiB): 227 on sm_90
# and sm_100, 163 on sm_80, 99 on sm_86, sm_89 and sm_120. Each fits and compiles without spilling
# registers in either memory layout (at 512 elsewhere than on sm_90, up to 60 bytes). On sm_90, 64
# rows keep one group of four warps busy and 128 two; with fewer rows there is no WGMMA, and with 64
# rows two groups both form all scores. At 512 channels the sums of a result do not fit beside them,
# so a program takes half of its channels: 1.5 times the products, all of them WGMMA. Elsewhere the
# warps share the columns of S, eight to a warp: with fewer than 64 columns eight warps repeat each
# other's work.
SIXTEEN_BITS: dict[int, dict[int, Tiles]] = {
    128: {
        99: Tiles(
            scores=(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
            both=(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
        ),
    },
    256: {
        227: Tiles(
            scores=(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
            both=(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
        ),
        163: Tiles(scores=(Tile(64, 64, 8, 2),), both=(Tile(64, 64, 8, 1),)),
        99: Tiles(scores=(Tile(64, 64, 8, 1),), both=(Tile(32, 64, 8, 1),)),
    },
    512: {
        227: Tiles(
            scores=(Tile(128, 32, 8, 2, part=256), Tile(64, 32, 4, 2, part=256)),
            both=(Tile(64, 16, 4, 2, part=256),),
        ),
        163: Tiles(scores=(Tile(32, 64, 8, 1),), both=(Tile(32, 32, 8, 1),)),
        99: Tiles(scores=(Tile(32, 32, 8, 2),), both=(Tile(32, 16, 8, 1),)),
    },
}
# float32 on any device: without tensor cores, since TF32 would miss the precision.
FLOAT32 = {
    256: Tiles(scores=(Tile(32, 16, 8, 1, 32),), both=(Tile(32, 16, 8, 1, 32),)),
    512: Tiles(scores=(Tile(16, 16, 8, 1, 32),), both=(Tile(16, 16, 8, 1, 32),)),
}


def takes_rows(tile: Tile, shared_memory: int) -> bool:
    """Whether the backward kernels want their operands as rows, with this tile of keys.

    With two groups of four warps, Triton 3.6 compiles them for sm_90 such that each WGMMA waits for
    the one before it (ptxas says C7515) where the operands of dV and dK are maps: 20 and 34 waits
    a step instead of 2 and 3. Copies cost as much as reading the maps once more.
    """
    return tile.chunk == 0 and tile.rows >= 128 and shared_memory >= 227 * 1024


def tiles(dtype: torch.dtype, channels: int, shared_memory: int) -> Tiles:
    """The tiles for the larger of the two head dimensions (at most 512).

    Args:
        dtype: of the query, key and value.
        channels: the larger of D and Dv.
        shared_memory: what a block may have on the device, bytes.
    """
    if dtype == torch.float32:
        return FLOAT32[256 if channels <= 256 else 512]
    by_memory = SIXTEEN_BITS[min(width for width in SIXTEEN_BITS if channels <= width)]
    return by_memory[max(kib for kib in by_memory if kib * 1024 <= shared_memory)]
