"""The arithmetic of confidence_attention's kernels, run on the CPU by Triton's interpreter.

bfloat16 is left out: the interpreter computes it wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from mcibi_fast.ops.confidence_attention import tiles as confidence_attention_tiles
from mcibi_fast.ops.confidence_attention.tiles import Tiles
from mcibi_fast.ops.confidence_attention.triton import (
    confidence_attention_backward,
    confidence_attention_forward,
)
from mcibi_fast.ops.triton_attention import Tile, readable
from tests.ops.triton.relative import assert_at_most_twice

pytestmark = pytest.mark.interpreted

# B, Nq, Nk, D, Dv: odd and prime lengths, tails on both sides, D and Dv no powers of two.
SHAPES = [
    (2, 37, 43, 16, 16),
    (1, 37, 71, 24, 40),
    (2, 31, 53, 64, 48),
    (1, 32, 64, 64, 64),
    (1, 41, 33, 256, 256),
    (1, 37, 17, 272, 48),
    (1, 19, 37, 48, 272),
    (1, 1, 29, 16, 16),
    (1, 29, 1, 16, 16),
]
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles each way at sizes that the interpreter gets through, as on a real GPU."""
    table = confidence_attention_tiles.SIXTEEN_BITS
    monkeypatch.setitem(table, 128, {99: _both(Tile(32, 16, 4, 1))})
    monkeypatch.setitem(table, 256, {99: _both(Tile(16, 32, 4, 1))})
    monkeypatch.setitem(table, 512, {99: _both(Tile(32, 16, 4, 1, part=128))})


def _both(tile: Tile) -> Tiles:
    return Tiles(scores=(tile,), both=(tile,))


@pytest.fixture(autouse=True)
def _surroundings(poison: None, products_in_order: None) -> Iterator[None]:
    yield


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, columns: bool = False
) -> list[Tensor]:
    """query, key, value and dO; with ``columns``, views of maps whose channels come first."""
    batch, num_queries, num_keys, dim, value_dim = shape
    sizes = ((num_queries, dim), (num_keys, dim), (num_keys, value_dim), (num_queries, value_dim))
    if columns:
        return [
            torch.randn(batch, d, n, generator=generator).to(dtype).transpose(1, 2)
            for n, d in sizes
        ]
    return [torch.randn(batch, n, d, generator=generator).to(dtype) for n, d in sizes]


def ours(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    out, lse = confidence_attention_forward(q, k, v, scale)
    return [out, lse, *confidence_attention_backward(grad, q, k, v, out, lse, scale)]


def eager(inputs: list[Tensor], scale: float, dtype: torch.dtype) -> list[Tensor]:
    """out, lse, dQ, dK, dV as PyTorch computes them in a dtype."""
    q, k, v, grad = (t.detach().to(dtype).requires_grad_() for t in inputs)
    scores = q @ k.transpose(1, 2) * scale
    out = torch.softmax(scores, -1) @ v
    gradients = torch.autograd.grad(out, (q, k, v), grad.detach())
    return [out.detach(), torch.logsumexp(scores.detach(), -1), *gradients]


def check(inputs: list[Tensor], scale: float) -> None:
    dtype = inputs[0].dtype
    results = ours(*inputs, scale)
    assert [t.dtype for t in results] == [dtype, torch.float32, dtype, dtype, dtype]
    truth, theirs = eager(inputs, scale, torch.float64), eager(inputs, scale, dtype)
    assert_at_most_twice(("out", "lse", "dQ", "dK", "dV"), results, theirs, truth)


@pytest.mark.parametrize(("dtype", "shape"), list(product(DTYPES, SHAPES)), ids=str)
def test_against_float64(
    dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    check(tensors(shape, dtype, generator), scale=shape[3] ** -0.5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [37, 48])  # 48: read in place
def test_columns_contiguous(dtype: torch.dtype, length: int, generator: torch.Generator) -> None:
    check(tensors((2, length, length, 32, 16), dtype, generator, columns=True), scale=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.3, 1.0, -2.0, 4.0, 8.0, 20.0])
def test_peaked_and_negative_scores(
    dtype: torch.dtype, scale: float, generator: torch.Generator
) -> None:
    """Log-sum-exps to 325, whose rounding P must not inherit."""
    check(tensors((1, 35, 35, 24, 24), dtype, generator), scale)


@pytest.mark.parametrize("scale", [1e6, 2e9, 3e10, -1e15, 1e30])
def test_scores_of_any_size(scale: float, generator: torch.Generator) -> None:
    """The largest score less itself is 0, however it was rounded."""
    inputs = tensors((1, 35, 19, 24, 24), torch.float32, generator)
    assert all(t.isfinite().all() for t in ours(*inputs, scale))
    check(inputs, scale)


def test_a_statistic_of_another_backend_serves(generator: torch.Generator) -> None:
    """The backward pass asks of lse only that it is near: here it is off by a thousandth."""
    q, k, v, grad = tensors((2, 35, 37, 16, 16), torch.float32, generator)
    out, lse = confidence_attention_forward(q, k, v, 2.0)
    truth = eager([q, k, v, grad], 2.0, torch.float64)[2:]
    theirs = eager([q, k, v, grad], 2.0, torch.float32)[2:]
    gradients = confidence_attention_backward(grad, q, k, v, out, lse * 1.001, 2.0)
    assert_at_most_twice(("dQ", "dK", "dV"), gradients, theirs, truth)


def test_any_strides(generator: torch.Generator) -> None:
    q, k, v, grad = tensors((2, 21, 18, 20, 20), torch.float32, generator)
    wide = torch.randn(2, 42, 63, generator=generator)
    # Values that are the same for each key would do for no check: dQ and dK are zero, but for
    # rounding, which is what would be compared.
    same_channels, same_queries = v[..., :1].expand(-1, -1, 20), grad[:, :1].expand(-1, 21, -1)
    check([wide[:, ::2, 3::3], k.flip(1), same_channels, same_queries], scale=0.2)
    check([q, k, v, torch.ones(1, 1, 1).expand(2, 21, 20)], scale=0.2)


@pytest.mark.slow
def test_same_bits_every_time(generator: torch.Generator) -> None:
    inputs = tensors((2, 35, 37, 16, 16), torch.float32, generator)
    for a, b in zip(ours(*inputs, 0.25), ours(*inputs, 0.25), strict=True):
        assert torch.equal(a, b)


def test_keys_past_the_end_do_not_count(generator: torch.Generator) -> None:
    """Scores far below 0, so that a key of zeros past the end would take all the weight."""
    q, k, v, grad = tensors((1, 17, 33, 16, 16), torch.float32, generator)
    check([q.abs() * 4, -k.abs() * 4, v, grad], scale=1.0)


def test_offsets_beyond_32_bits(generator: torch.Generator) -> None:
    stride = 2**30 + 16  # of rows: the third begins past element 2^31
    torch.use_deterministic_algorithms(False)  # or all of it would be filled
    try:
        storage = torch.empty(2 * stride + 16, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("needs 4.3 GB of address space")
    far = storage.as_strided((1, 3, 16), (3 * stride, stride, 1))
    q, k, *_ = tensors((1, 3, 3, 16, 16), torch.float16, generator)
    far.copy_(k)
    assert readable(far) is far
    for near, apart in zip(ours(q, k, k, k, 0.25), ours(q, far, far, far, 0.25), strict=True):
        assert torch.equal(near, apart)


def test_nan_and_infinity_reach_the_result(generator: torch.Generator) -> None:
    q, k, v, _ = tensors((1, 20, 20, 16, 16), torch.float32, generator)
    q[0, 3, 2] = torch.nan
    out, lse = confidence_attention_forward(q, k, v, 0.25)
    expected = torch.softmax(q @ k.transpose(1, 2) * 0.25, -1) @ v
    assert torch.equal(out.isnan(), expected.isnan()) and lse[0, 3].isnan()
