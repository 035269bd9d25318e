"""What a launch of the Triton kernels takes on the host."""

from __future__ import annotations

import importlib

import pytest

pytest.importorskip("triton", reason="needs Triton")

from triton.runtime.jit import JITFunction

from mcibi_fast.ops.triton_attention import cdiv, width

MODULES = [
    "triton_attention",
    "triton_split",
    *(f"confidence_attention.{name}" for name in ("triton", "triton_forward")),
    *(f"class_rank_attention.{name}" for name in ("triton", "triton_forward", "triton_hard")),
]


@pytest.mark.parametrize("module", MODULES)
def test_no_kernel_reads_constants_of_its_module(module: str) -> None:
    """Triton would compare each of them at every launch, in 3 us."""
    members = vars(importlib.import_module(f"mcibi_fast.ops.{module}")).values()
    kernels = [member for member in members if isinstance(member, JITFunction)]
    assert kernels
    for kernel in kernels:
        assert kernel.cache_key  # it is what finds them
        assert not kernel.used_global_vals, kernel


def test_sizes() -> None:
    assert [cdiv(n, 64) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
    assert [width(n) for n in (1, 16, 17, 150, 256, 257)] == [16, 16, 32, 256, 256, 512]
