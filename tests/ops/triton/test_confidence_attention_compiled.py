"""What the kernels of confidence_attention take of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from mcibi_fast.ops.confidence_attention import triton as kernels
from tests.ops.triton.compiled import (
    MANY,
    Case,
    Usage,
    compiling_for,
    hold_to_budget,
    instructions,
    usage,
)

OP = "confidence_attention"
CASES = [
    *(Case(a, torch.bfloat16, d) for a in (80, 86, 90) for d in (256, 512)),
    Case(90, torch.bfloat16, 256, layout="rows"),
    Case(90, torch.bfloat16, 256, processors=MANY),
    Case(80, torch.float32, 512),
    Case(90, torch.float32, 256),
    # One image of 64x64 and of 32x32 pixels on an H200: large and small tiles.
    *(
        Case(90, torch.bfloat16, d, layout, processors=132, rows=n)
        for d in (256, 512)
        for layout in ("rows", "columns")
        for n in (4096, 1024)
    ),
]


def compile_all(case: Case, *tensors: torch.Tensor) -> Usage:
    """The kernels of a forward and a backward pass on query, key, value and dO."""
    query, key, value, grad = tensors
    with compiling_for(case, kernels) as compiled:
        out, lse = kernels.confidence_attention_forward(query, key, value, 0.1)
        kernels.confidence_attention_backward(grad, query, key, value, out, lse, 0.1)
    names = ("forward", "delta", "query gradient", "value gradient", "key gradient")
    return {name: usage(kernel) for name, kernel in zip(names, compiled, strict=True)}


def compile_split(case: Case) -> dict[str, Any]:
    """The kernels of a forward pass whose keys are split."""
    with compiling_for(case, kernels) as compiled:
        kernels.confidence_attention_forward(*[case.tensor()] * 3, 0.1)
    return dict(zip(("split forward", "join"), compiled, strict=True))


def measure(case: Case) -> Usage:
    if case.split:
        return {name: usage(kernel) for name, kernel in compile_split(case).items()}
    return compile_all(case, *[case.tensor()] * 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_budget(case: Case) -> None:
    hold_to_budget(OP, case, measure(case))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [256, 512])
def test_products_are_wgmmas_that_overlap(channels: int) -> None:
    """Also where operands are maps: not each WGMMA waits for the one before it (C7515)."""
    case = Case(90, torch.bfloat16, channels)
    tensors = [case.tensor()] * 3
    with compiling_for(case, kernels) as compiled:
        out, lse = kernels.confidence_attention_forward(*tensors, 0.1)
        kernels.confidence_attention_backward(case.tensor(), *tensors, out, lse, 0.1)
    for kernel in compiled:
        names = instructions(kernel)
        products = sum(name.startswith("HGMMA") for name in names)
        waits = names.count("WARPGROUP.DEPBAR")
        assert products >= 8 * waits
        assert (products > 0) == ("HMMA" not in names) == (kernel.name != "_delta_kernel")


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.split], ids=str)
def test_split_keys_are_multiplied_as_all_keys_are(case: Case) -> None:
    """By WGMMAs none of which waits for the one before it."""
    names = instructions(compile_split(case)["split forward"])
    products = sum(name.startswith("HGMMA") for name in names)
    assert products >= 8 * names.count("WARPGROUP.DEPBAR") > 0 and "HMMA" not in names


def test_unusual_sizes_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query (to Triton a compile-time 1), masked D and Dv that differ, 64-bit offsets."""
    monkeypatch.setattr(kernels, "wide_offsets", lambda *tensors: True)
    case = Case(90, torch.float16, 48)
    sizes = ((2, 1, 19), (2, 67, 19), (2, 67, 48), (2, 1, 48))
    assert len(compile_all(case, *(torch.zeros(s, dtype=case.dtype) for s in sizes))) == 5
