"""The arithmetic of class_rank_attention's kernels, run on the CPU by Triton's interpreter.

bfloat16 is left out: the interpreter computes it wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

import mcibi_fast
from mcibi_fast import ops
from mcibi_fast.ops.class_rank_attention import ATTENTION, ATTENTION_BACKWARD
from mcibi_fast.ops.class_rank_attention import triton as kernels
from mcibi_fast.ops.class_rank_attention import triton_hard as hard_kernels
from mcibi_fast.ops.class_rank_attention.tiles import Tiles
from mcibi_fast.ops.triton_attention import Tile
from tests.ops.triton.relative import assert_at_most_twice

pytestmark = pytest.mark.interpreted

# B, N, K: prime lengths, one pixel, one class, classes of every padding.
SHAPES = [
    (2, 37, 1),
    (1, 1, 19),
    (2, 48, 16),
    (2, 37, 19),
    (1, 53, 60),
    (1, 41, 150),
    (1, 31, 256),
]
DTYPES = [torch.float32, torch.float16]
SLOW_LAYOUTS = [pytest.param(layout, marks=pytest.mark.slow) for layout in ("map", "strided")]


@pytest.fixture(autouse=True)
def _surroundings(poison: None, products_in_order: None) -> Iterator[None]:
    yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles each way at sizes that the interpreter gets through, as on a real GPU."""
    choose = kernels.tiles

    def tiles(*args: object) -> Tiles:
        small = [Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)]
        return Tiles(
            *((t._replace(chunk=c[0].chunk),) for t, c in zip(small, choose(*args), strict=True))
        )

    monkeypatch.setattr(kernels, "tiles", tiles)
    monkeypatch.setattr(hard_kernels, "TILE", 1024)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of t as rows, as those of a map (B, K, h, w), or every second one, NaN between."""
    if layout == "map":
        return t.mT.contiguous().mT
    if layout == "strided":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    return t.contiguous()


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """query, weights and dO."""
    query, logits, grad = (torch.randn(shape, generator=generator) for _ in range(3))
    return query.to(dtype), (2 * logits).softmax(-1).to(dtype), grad.to(dtype)


def ours(query: Tensor, weights: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    out, lse = kernels.class_rank_attention_forward(query, weights, scale)
    gradients = kernels.class_rank_attention_backward(grad, query, weights, out, lse, scale)
    return [out, lse, *gradients]


def eager(inputs: tuple[Tensor, ...], scale: float, dtype: torch.dtype) -> list[Tensor]:
    """out, lse, dQ, dW as PyTorch computes them in a dtype."""
    query, weights, grad = (t.detach().to(dtype).requires_grad_() for t in inputs)
    scores = scale * query @ weights.mT
    out = torch.softmax(scores, -1) @ weights
    gradients = torch.autograd.grad(out, (query, weights), grad.detach())
    return [out.detach(), torch.logsumexp(scores.detach(), -1), *gradients]


def check(inputs: tuple[Tensor, ...], scale: float) -> None:
    dtype = inputs[0].dtype
    results = ours(*inputs, scale)
    assert [t.dtype for t in results] == [dtype, torch.float32, dtype, dtype]
    truth, theirs = eager(inputs, scale, torch.float64), eager(inputs, scale, dtype)
    assert_at_most_twice(("out", "lse", "dQ", "dW"), results, theirs, truth)


@pytest.mark.parametrize(("dtype", "shape"), list(product(DTYPES, SHAPES)), ids=str)
@pytest.mark.thinned
def test_against_float64(
    dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    check(tensors(shape, dtype, generator), scale=1.7)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-3.0, 0.0, 2.0**-13, 0.044, 40.0, 300.0])
@pytest.mark.thinned
def test_scales(dtype: torch.dtype, scale: float, generator: torch.Generator) -> None:
    """From an even softmax to a peaked one; in float16, gradients that a small scale shrinks."""
    check(tensors((1, 35, 19), dtype, generator), scale)


@pytest.mark.parametrize("scale", [1e6, 2e9, 3e10, -1e15, 1e30])
def test_scores_of_any_size(scale: float, generator: torch.Generator) -> None:
    """The largest score less itself is 0, however it was rounded."""
    inputs = tensors((1, 35, 19), torch.float32, generator)
    assert all(t.isfinite().all() for t in ours(*inputs, scale))
    check(inputs, scale)


def test_small_scale_does_not_underflow(generator: torch.Generator) -> None:
    """Of float16 numbers: a large Q makes up for the scale in S and in dW, not in scale dS."""
    query, weights, grad = tensors((1, 35, 19), torch.float16, generator)
    check((query * 2**13, weights, grad), scale=1.7 * 2**-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_from_zero(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Rows of W sum to one, so a shift of Q shifts the scores alone: keys past the end do not
    count, and the rounding of a large log-sum-exp is not P's."""
    query, weights, grad = tensors((1, 35, 19), dtype, generator)
    for shift in (-32.0, 32.0):
        check((query + shift, weights, grad), scale=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(2, 37, 19), (2, 32, 19), (1, 21, 32)], ids=str)
def test_layouts(size: tuple[int, ...], generator: torch.Generator) -> None:
    """Read in place or copied, the values are the same."""
    inputs = tensors(size, torch.float16, generator)
    expected = ours(*inputs, 1.7)
    for layouts in (("map",) * 3, ("rows", "map", "strided")):
        results = ours(*(laid_out(t, at) for t, at in zip(inputs, layouts, strict=True)), 1.7)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_expanded_gradient(generator: torch.Generator) -> None:
    query, weights, _ = tensors((2, 21, 19), torch.float32, generator)
    check((query, weights, torch.ones(1, 1, 1).expand(2, 21, 19)), scale=1.7)


def test_same_bits_every_time(generator: torch.Generator) -> None:
    inputs = tensors((2, 33, 19), torch.float32, generator)
    for a, b in zip(ours(*inputs, 1.7), ours(*inputs, 1.7), strict=True):
        assert torch.equal(a, b)
    hard = [hard_kernels.class_rank_attention_hard(*inputs[:2], 1.7) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*hard, strict=True))


@pytest.mark.parametrize(("backward", "scale"), [("cpu", 6.0), ("triton", 20.0)])
def test_backends_share_the_statistic(
    backward: str, scale: float, generator: torch.Generator
) -> None:
    """The backward passes that read a statistic, with that of every forward pass.

    With Triton's the results' own rounding, in delta, does not matter either.
    """
    inputs = query, weights, grad = tensors((2, 37, 19), torch.float32, generator)
    (kernel,) = (k for k in ATTENTION_BACKWARD.kernels if k.backend == backward)
    if (reason := kernel.why_not(query)) is not None:
        pytest.skip(f"needs the backend: {reason}")
    truth, theirs = eager(inputs, scale, torch.float64), eager(inputs, scale, torch.float32)
    forward = (query, weights, scale, False)
    made = {k.backend: k.run(*forward) for k in ATTENTION.kernels if k.why_not(*forward) is None}
    assert {"triton", "sdpa", "reference"} <= made.keys()
    for statistic in made.values():
        results = kernel.run(grad, query, weights, *statistic, scale)
        assert_at_most_twice(("dQ", "dW"), results, theirs[2:], truth[2:])


# --- hard ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", *SLOW_LAYOUTS])
@pytest.mark.parametrize(("dtype", "shape"), list(product(DTYPES, SHAPES)), ids=str)
@pytest.mark.thinned(together=2)
def test_hard(
    dtype: torch.dtype, shape: tuple[int, ...], layout: str, generator: torch.Generator
) -> None:
    """Against keys that are one-hot; ties go to the first, and absent classes have weight 0."""
    query, weights, grad = tensors(shape, dtype, generator)
    weights = (4 * weights).round()
    first = (weights == weights.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
    W = F.one_hot(first, shape[-1])
    absent = (W.sum(1, keepdim=True) == 0).expand(shape)
    assert absent.any() or shape[-1] <= 16
    leaf = laid_out(query, layout).requires_grad_()
    with mcibi_fast.backend("triton"):
        out = ops.class_rank_attention(leaf, laid_out(weights, layout), scale=1.7, hard=True)
    (query_grad,) = torch.autograd.grad(out, leaf, grad)
    lse = hard_kernels.class_rank_attention_hard(query, weights, 1.7)[1]
    assert not out[absent].any() and not query_grad[absent].any()
    truth = eager((query, W, grad), 1.7, torch.float64)[:3]
    theirs = eager((query, W, grad), 1.7, dtype)[:3]
    results = [out.detach(), lse, query_grad.contiguous()]
    assert_at_most_twice(("out", "lse", "dQ"), results, theirs, truth)


def test_hard_weights_need_not_be_weights(generator: torch.Generator) -> None:
    """Logits, -inf and NaN, which is the largest: as argmax of PyTorch."""
    query, weights, _ = tensors((2, 37, 19), torch.float32, generator)
    logits = weights.log()
    logits[0, 3], logits[0, 4, 5], logits[1, 6, 18] = -torch.inf, torch.nan, torch.inf
    logits[1, 7, 2], logits[1, 7, 9] = torch.inf, torch.nan
    with mcibi_fast.backend("reference"):
        expected = ops.class_rank_attention(query, logits, scale=0.5, hard=True)
    with mcibi_fast.backend("triton"):
        result = ops.class_rank_attention(query, logits, scale=0.5, hard=True)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("hard", [False, True])
def test_not_a_number_stays_in_its_query(hard: bool, generator: torch.Generator) -> None:
    query, weights, _ = tensors((1, 40, 19), torch.float32, generator)
    query[0, 33, int(weights[0, 0].argmax())] = torch.nan  # a class that is present
    with mcibi_fast.backend("triton"):
        out = ops.class_rank_attention(query, weights, scale=1.7, hard=hard)
    assert out[0, 33].isnan().all() and out.isnan().sum() == 19


# --- the op ------------------------------------------------------------------------------------


def test_explain_and_refusals(generator: torch.Generator) -> None:
    query, weights, _ = tensors((1, 5, 19), torch.float32, generator)
    for hard in (False, True):
        text = mcibi_fast.explain("class_rank_attention", query, weights, scale=1.0, hard=hard)
        assert text.startswith("class_rank_attention: triton\n  triton    runs\n")
    text = mcibi_fast.explain(
        "class_rank_attention", query.double(), weights.double(), scale=1.0, hard=True
    )
    assert "triton    no: its kernels have no float64" in text
    wide = torch.zeros(1, 3, 257)
    with mcibi_fast.backend("triton"):
        with pytest.raises(ops.BackendError, match="257 channels; its kernels hold at most 256"):
            ops.class_rank_attention(wide, wide, scale=1.0)
        with pytest.raises(ops.BackendError, match="no float64"):
            ops.class_rank_attention(query.double(), weights.double(), scale=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("hard", [False, True])
def test_compiled_graph(hard: bool, generator: torch.Generator) -> None:
    """The operator and its backward in a traced graph give what they give in eager mode."""
    query, weights, grad = tensors((2, 21, 19), torch.float32, generator)

    def run(query: Tensor, weights: Tensor) -> Tensor:
        return ops.class_rank_attention(query, weights, scale=1.7, hard=hard)

    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)):
        leaves = [query.clone().requires_grad_(), weights.clone().requires_grad_(not hard)]
        with mcibi_fast.backend("triton"):
            out = call(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out, leaves[: 2 - hard], grad)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
