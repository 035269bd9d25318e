"""The C++ kernels of class-rank attention, called directly, against a plain float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mcibi_fast import _build

if _build.load_extensions()["cpu"] is not None:
    pytest.skip(f"needs _cpu: {_build.load_extensions()['cpu']}", allow_module_level=True)

kernels = torch.ops.mcibi_fast_cpu

# (B, N, K): single pixels and classes, every block of classes, tails of panels, groups and tiles.
SIZES = [
    (1, 1, 1),
    (1, 7, 1),
    (2, 57, 8),
    (2, 129, 19),
    (3, 64, 24),
    (1, 113, 60),
    (1, 231, 150),
    (2, 13, 33),
    (1, 1024, 19),
]
LOW = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "map", "strided", "expanded"]
SCALE = 1.7


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of t (for "expanded": of its first image) in a memory layout."""
    if layout == "map":  # the rows of a (B, K, h, w) map
        return t.mT.contiguous().mT
    if layout == "strided":  # every second element, NaN between
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    if layout == "expanded":
        return t[:1].expand_as(t)
    return t.contiguous()


def make(
    size: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, weights, and a gradient of the output; all exact in every dtype."""
    g = torch.Generator().manual_seed(sum(size))
    query, logits, grad = (torch.randn(size, generator=g).bfloat16() for _ in range(3))
    return query.to(dtype), (2 * logits).softmax(-1).to(dtype), grad.to(dtype)


def eager(query: Tensor, weights: Tensor, scale: float = SCALE) -> Tensor:
    return torch.softmax(scale * query @ weights.mT, -1) @ weights


def gradients(query: Tensor, weights: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (query, weights)]
    return torch.autograd.grad(eager(*leaves, scale), leaves, grad)


def ours(query: Tensor, weights: Tensor, grad: Tensor, scale: float = SCALE) -> tuple[Tensor, ...]:
    """The result and both gradients."""
    out, lse = kernels.class_rank_attention(query, weights, scale, False)
    back = kernels.class_rank_attention_backward(grad, query, weights, out, lse, scale)
    return out, *back


def expected(
    query: Tensor, weights: Tensor, grad: Tensor, scale: float = SCALE
) -> tuple[Tensor, ...]:
    return eager(query, weights, scale), *gradients(query, weights, grad, scale)


def error(result: Tensor, exact: Tensor) -> float:
    """Relative error in the Euclidean norm; absolute where that is zero."""
    size = float(exact.norm())
    return float((result.double() - exact).norm()) / (size if size > 1e-6 else 1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64(size: tuple[int, ...], layout: str, poison: None) -> None:
    inputs = [laid_out(t, layout) for t in make(size)]
    for result, exact in zip(ours(*inputs), expected(*inputs), strict=True):
        assert result.is_contiguous()
        assert error(result, exact) < 1e-13
    query, weights, _ = inputs
    lse = kernels.class_rank_attention(query, weights, SCALE, False)[1]
    assert error(lse, (SCALE * query @ weights.mT).logsumexp(-1)) < 1e-14


@pytest.mark.parametrize("scale", [SCALE, 40.0, -3.0])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.thinned(together=2)
def test_low_precision(
    size: tuple[int, ...], dtype: torch.dtype, scale: float, poison: None
) -> None:
    inputs = make(size, dtype)
    truth = expected(*(t.double() for t in inputs), scale)
    bars = expected(*inputs, scale)
    for layout in ("contiguous", "map", "strided"):
        results = ours(*(laid_out(t, layout) for t in inputs), scale)
        for result, exact, bar in zip(results, truth, bars, strict=True):
            assert result.dtype == dtype
            # Of one class the query's gradient is 0, of which there is no share.
            unit = (4 * abs(scale) if size[-1] == 1 else 1) * torch.finfo(dtype).eps
            assert error(result, exact) <= 2 * error(bar, exact) + unit


@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_hard_counts_first_argmaxes(
    size: tuple[int, ...], dtype: torch.dtype, poison: None
) -> None:
    query, weights, _ = make(size, dtype)
    weights = (4 * weights).round()  # ties
    first = (weights == weights.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
    W = torch.nn.functional.one_hot(first, size[-1]).double()
    scores = SCALE * query.double() @ W.mT
    unit = torch.finfo(dtype).eps
    for layout in LAYOUTS[:3]:
        out, lse = kernels.class_rank_attention(
            laid_out(query, layout), laid_out(weights, layout), SCALE, True
        )
        assert error(out, scores.softmax(-1) @ W) <= 16 * unit
        assert error(lse, scores.logsumexp(-1)) <= 16 * torch.finfo(lse.dtype).eps
        absent = W.sum(1) == 0  # (B, K)
        assert not out[absent[:, None].expand_as(out)].any()


def test_scores_far_from_zero() -> None:
    """All scores of a row far below or above zero: nothing underflows or overflows."""
    query, weights, grad = make((1, 91, 19), torch.float32)
    # Each row of W sums to one, so that this shifts the scores and changes nothing else.
    for shift in (-300.0, 300.0):
        shifted = query + shift
        assert all(t.isfinite().all() for t in ours(shifted, weights, grad, 1.0))
        truth = expected(shifted.double(), weights.double(), grad.double(), 1.0)
        bars = expected(shifted, weights, grad, 1.0)
        for result, exact, bar in zip(ours(shifted, weights, grad, 1.0), truth, bars, strict=True):
            assert error(result, exact) <= 2 * error(bar, exact) + 1e-6


@pytest.mark.parametrize("scale", [1e3, 1e6, 2e9, 3e10, -1e15, 1e30])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 57, 8), (1, 231, 150)], ids=str)
def test_scores_of_any_size(size: tuple[int, ...], scale: float) -> None:
    """A softmax of one key, or of few: its largest score less itself is 0, however rounded."""
    inputs = make(size, torch.float32)
    truth = expected(*(t.double() for t in inputs), scale)
    bars = expected(*inputs, scale)
    for result, exact, bar in zip(ours(*inputs, scale), truth, bars, strict=True):
        assert result.isfinite().all()
        # Of one class the query's gradient is 0; a rounding of its terms is not.
        unit = (4 * abs(scale) if size[-1] == 1 else 1) * torch.finfo(torch.float32).eps
        assert error(result, exact) <= 2 * error(bar, exact) + unit


class _Unfused(torch.autograd.Function):
    """A B^T whose products are rounded before they are added, as without fused multiply-add."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        result = a.new_zeros(*a.shape[:2], b.shape[1])
        for x, y in zip(a.unbind(2), b.unbind(2), strict=True):
            result = result + x[:, :, None] * y[:, None]
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return _Unfused.apply(grad, b.mT), _Unfused.apply(grad.mT, a.mT)


def yardstick(query: Tensor, weights: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, ...]:
    """PyTorch's results, on the baseline without the fused multiply-add that it does not have."""
    if _build.build_info()["cpu_flavour"] != "baseline":
        return expected(query, weights, grad, scale)
    leaves = [t.clone().requires_grad_() for t in (query, weights)]
    P = torch.softmax(_Unfused.apply(scale * leaves[0], leaves[1]), -1)
    out = _Unfused.apply(P, leaves[1].mT)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("scale", [4.0, 20.0, 100.0])
@pytest.mark.parametrize("size", [(1, 35, 19), (1, 37, 7), (1, 37, 21)], ids=str)
def test_rows_of_the_scores_gradient_sum_to_zero(size: tuple[int, ...], scale: float) -> None:
    """Although delta is rounded: where the softmax is peaked, the gradients are its rounding."""
    unit = torch.finfo(torch.float32).eps / 2
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        query, logits, grad = (torch.randn(size, generator=generator) for _ in range(3))
        inputs = query, (2 * logits).softmax(-1), grad
        truth = expected(*(t.double() for t in inputs), scale)
        results, bars = ours(*inputs, scale), yardstick(*inputs, scale)
        for result, exact, bar in zip(results, truth, bars, strict=True):
            assert error(result, exact) <= 2 * error(bar, exact) + unit


@pytest.mark.parametrize("scale", [SCALE, -3.0])
def test_long_sums_round_little(scale: float) -> None:
    """Sums are made in two steps, and the backward's softmax, from a rounded statistic, is
    normalised again: without either the errors are twice as large or more."""
    inputs = make((1, 1024, 19), torch.float32)
    truth = expected(*(t.double() for t in inputs), scale)
    results, bars = ours(*inputs, scale), expected(*inputs, scale)
    for result, exact, bar in zip(results, truth, bars, strict=True):
        assert error(result, exact) <= 1.6 * error(bar, exact)


def test_not_a_number_stays_in_its_query() -> None:
    query, weights, _ = make((1, 70, 5), torch.float32)
    query[0, 33, 2] = float("nan")
    out, lse = kernels.class_rank_attention(query, weights, SCALE, False)
    assert out[0, 33].isnan().all() and lse[0, 33].isnan()
    assert out.isnan().sum() == 5 and lse.isnan().sum() == 1


def test_same_bits_for_any_number_of_threads() -> None:
    inputs = make((2, 321, 19), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            hard = kernels.class_rank_attention(*inputs[:2], SCALE, True)
            results.append(torch.cat([t.flatten() for t in (*ours(*inputs), *hard)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])
