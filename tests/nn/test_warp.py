"""Warping by flow: what is read where."""

from __future__ import annotations

import torch

from mcibi_fast.nn.warp import warp


def test_what_is_read_where(generator: torch.Generator) -> None:
    maps = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    flow = torch.zeros(2, 2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(warp(maps, flow), maps, rtol=1e-13, atol=1e-13)
    flow[:, 0], flow[:, 1] = 2, -1  # two to the right, one up
    moved = torch.zeros_like(maps)
    moved[:, :, 1:, :-2] = maps[:, :, :-1, 2:]
    torch.testing.assert_close(warp(maps, flow), moved, rtol=1e-13, atol=1e-13)
    flow[:, 0], flow[:, 1] = 0.25, 0
    between = 0.75 * maps[..., :-1] + 0.25 * maps[..., 1:]
    torch.testing.assert_close(warp(maps, flow)[..., :-1], between, rtol=1e-13, atol=1e-13)


def test_positions_are_exact_in_bfloat16() -> None:
    maps = torch.arange(400, dtype=torch.float32).remainder(8).expand(1, 1, 2, 400)
    flow = torch.zeros(1, 2, 2, 400)
    warped = warp(maps.bfloat16(), flow.bfloat16())
    assert warped.dtype == torch.bfloat16
    torch.testing.assert_close(warped.float(), maps, rtol=0, atol=0.05)
