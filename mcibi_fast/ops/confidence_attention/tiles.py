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
# registers in either memory layout (at 512, up to 60 bytes). On sm_90, 64 rows keep one group of
# four warps busy and 128 two. Elsewhere the warps share the columns of S, eight to a warp: with
# fewer than 64 columns eight warps repeat each other's work.
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
        227: Tiles(scores=(Tile(64, 32, 8, 2),), both=(Tile(32, 32, 8, 1),)),
        163: Tiles(scores=(Tile(32, 64, 8, 1),), both=(Tile(32, 32, 8, 1),)),
        99: Tiles(scores=(Tile(32, 32, 8, 2),), both=(Tile(32, 16, 8, 1),)),
    },
}
# float32 on any device: without tensor cores, since TF32 would miss the precision.
FLOAT32 = {
    256: Tiles(scores=(Tile(32, 16, 8, 1, 32),), both=(Tile(32, 16, 8, 1, 32),)),
    512: Tiles(scores=(Tile(16, 16, 8, 1, 32),), both=(Tile(16, 16, 8, 1, 32),)),
}


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
