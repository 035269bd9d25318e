"""What the kernels of class_rank_attention take of a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from mcibi_fast.ops.class_rank_attention import triton as kernels
from mcibi_fast.ops.class_rank_attention.triton_hard import class_rank_attention_hard
from tests.ops.triton.compiled import (
    MANY,
    Case,
    Usage,
    columns_of_products,
    compiling_for,
    hold_to_budget,
    usage,
)

OP = "class_rank_attention"
CASES = [
    *(Case(a, torch.bfloat16, k) for a in (80, 86, 90) for k in (19, 150)),
    Case(86, torch.bfloat16, 100),
    Case(90, torch.bfloat16, 100),
    Case(90, torch.bfloat16, 150, layout="rows"),
    Case(90, torch.bfloat16, 150, processors=MANY),
    Case(80, torch.float32, 150),
    Case(90, torch.float32, 19),
    *(Case(90, torch.bfloat16, k, processors=132, rows=n) for k in (19, 150) for n in (4096, 1024)),
]


def compile_all(case: Case, *tensors: torch.Tensor) -> Usage:
    """The kernels of the soft form's passes and of the hard form, on query, weights and dO."""
    query, weights, grad = tensors
    with compiling_for(case, kernels) as compiled:
        out, lse = kernels.class_rank_attention_forward(query, weights, 0.1)
        kernels.class_rank_attention_backward(grad, query, weights, out, lse, 0.1)
        class_rank_attention_hard(query, weights, 0.1)
    names = (
        "forward",
        "delta",
        "query gradient",
        "weights gradient",
        "hard counts",
        "hard softmax",
    )
    return {name: usage(kernel) for name, kernel in zip(names, compiled, strict=True)}


def measure(case: Case) -> Usage:
    if not case.split:
        return compile_all(case, *[case.tensor()] * 3)
    with compiling_for(case, kernels) as compiled:
        kernels.class_rank_attention_forward(*[case.tensor()] * 2, 0.1)
    names = ("split forward", "join")
    return {name: usage(kernel) for name, kernel in zip(names, compiled, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_budget(case: Case) -> None:
    hold_to_budget(OP, case, measure(case))


@pytest.mark.slow
def test_150_classes_are_not_padded_to_256() -> None:
    """A step over 64 rows multiplies 160 classes in each of its 2, 3 and 4 products."""
    case = Case(90, torch.bfloat16, 150)
    query, weights, grad = [case.tensor()] * 3
    with compiling_for(case, kernels) as compiled:
        out, lse = kernels.class_rank_attention_forward(query, weights, 0.1)
        kernels.class_rank_attention_backward(grad, query, weights, out, lse, 0.1)
    forward, _, query_gradient, weights_gradient = map(columns_of_products, compiled)
    assert [forward, query_gradient, weights_gradient] == [n * 160 * 64 // 16 for n in (2, 3, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(2, 1, 1), (1, 67, 256)], ids=str)
def test_unusual_sizes_compile(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel and class (to Triton compile-time 1s), a tail of rows, 64-bit offsets."""
    monkeypatch.setattr(kernels, "wide_offsets", lambda *tensors: True)
    case = Case(90, torch.float16, size[2])
    assert len(compile_all(case, *[torch.zeros(size, dtype=case.dtype)] * 3)) == 6
