"""Attention whose keys are split, run on the CPU by Triton's interpreter.

bfloat16 is left out: the interpreter computes it wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from mcibi_fast.ops.class_rank_attention import tiles as class_rank_tiles
from mcibi_fast.ops.class_rank_attention import triton as class_rank
from mcibi_fast.ops.confidence_attention import tiles as confidence_tiles
from mcibi_fast.ops.confidence_attention import triton as confidence
from mcibi_fast.ops.triton_attention import Tile
from mcibi_fast.ops.triton_split import Cut, cut
from tests.ops import extremes
from tests.ops.table import Case
from tests.ops.triton.relative import assert_at_most_twice

pytestmark = pytest.mark.interpreted

# B, Nq, Nk, D, Dv: odd and prime lengths, fewer keys than parts, one key, one query.
SHAPES = [
    (2, 37, 101, 16, 16),
    (1, 33, 97, 24, 40),
    (2, 16, 64, 64, 48),
    (1, 17, 53, 48, 272),
    (2, 7, 3, 16, 16),
    (1, 29, 1, 16, 16),
    (1, 1, 131, 16, 16),
    (1, 1, 1, 16, 16),
]
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _surroundings(poison: None, products_in_order: None) -> Iterator[None]:
    yield


@pytest.fixture(params=[3, 1000], ids="at most {} parts".format)
def divide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cut]:
    """Small tiles, and keys split into so many parts where there are as many tiles of them."""

    def divided(
        choices: Any,
        batch: int,
        rows: int,
        columns: int,
        processors: int,
        channels: int = 0,
        split: bool = False,
    ) -> Cut:
        tile = Tile(16, 16, 4, 1, choices[-1].chunk, part=128 if channels > 128 else 0)
        steps = -(-columns // tile.columns)
        span = -(-steps // (min(steps, request.param) if split else 1)) * tile.columns
        return Cut(tile, -(-columns // span), span)

    for kernels in (confidence, class_rank):
        monkeypatch.setattr(kernels, "cut", divided)
    return divided


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float, dtype: torch.dtype) -> Any:
    """The result and the log-sum-exp as PyTorch computes them in a dtype."""
    q, k, v = (t.to(dtype) for t in (query, key, value))
    scores = q @ k.mT * scale
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


def check(found: tuple[Tensor, Tensor], *inputs: Tensor, scale: float) -> None:
    truth = exact(*inputs, scale, torch.float64)
    theirs = exact(*inputs, scale, inputs[0].dtype)
    assert found[0].dtype == inputs[0].dtype and found[1].dtype == torch.float32
    assert_at_most_twice(("out", "lse"), found, theirs, truth)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Rows, or with the layout "map" a view of a map whose channels come first."""
    tensor = torch.randn(shape, generator=generator).to(dtype)
    return tensor.mT.contiguous().mT if layout == "map" else tensor


@pytest.mark.parametrize("layout", ["rows", "map"])
@pytest.mark.parametrize(("dtype", "shape"), list(product(DTYPES, SHAPES)), ids=str)
@pytest.mark.thinned(together=2)
def test_confidence_attention(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
    divide: Any,
    generator: torch.Generator,
) -> None:
    batch, queries, keys, d, dv = shape
    sizes = ((batch, queries, d), (batch, keys, d), (batch, keys, dv))
    inputs = [normal(generator, *size, dtype=dtype, layout=layout) for size in sizes]
    found = confidence.confidence_attention_forward(*inputs, d**-0.5)
    check(found, *inputs, scale=d**-0.5)


@pytest.mark.parametrize("layout", ["rows", "map"])
@pytest.mark.parametrize("size", [(2, 101, 19), (1, 53, 150), (2, 3, 60), (1, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.thinned(together=2)
def test_class_rank_attention(
    dtype: torch.dtype,
    size: tuple[int, ...],
    layout: str,
    divide: Any,
    generator: torch.Generator,
) -> None:
    query, logits = (normal(generator, *size, dtype=torch.float32, layout=layout) for _ in range(2))
    query, weights = query.to(dtype), (2 * logits).softmax(-1).to(dtype)
    found = class_rank.class_rank_attention_forward(query, weights, 1.7)
    check(found, query, weights, weights, scale=1.7)


@pytest.mark.parametrize("scale", [-2.0, 20.0, 1e6, -1e15, 1e30])
@pytest.mark.thinned
def test_scores_of_any_size(scale: float, divide: Any, generator: torch.Generator) -> None:
    """Parts are joined by maxima that are not rounded, unlike a large log-sum-exp."""
    q, k, v = (normal(generator, 1, 53, 24, dtype=torch.float32, layout="rows") for _ in range(3))
    check(confidence.confidence_attention_forward(q, k, v, scale), q, k, v, scale=scale)
    weights = k.softmax(-1)
    found = class_rank.class_rank_attention_forward(q, weights, scale)
    check(found, q, weights, weights, scale=scale)


def test_scores_of_minus_infinity_in_all_of_a_part(divide: Any, generator: torch.Generator) -> None:
    """They have no weight, unless all of a query's scores are."""
    q, k, v = (normal(generator, 1, 53, 16, dtype=torch.float32, layout="rows") for _ in range(3))
    q[0, :, 0], k[0, :, 0] = 1.0, 0.0
    k[0, :20, 0] = -torch.inf
    check(confidence.confidence_attention_forward(q, k, v, 0.25), q, k, v, scale=0.25)
    k[0, :, 0] = -torch.inf
    out, lse = confidence.confidence_attention_forward(q, k, v, 0.25)
    assert out.isnan().all() and (lse == -torch.inf).all()


def test_gradients_take_the_joined_statistic(divide: Any, generator: torch.Generator) -> None:
    inputs = [normal(generator, 1, 53, 24, dtype=torch.float32, layout="rows") for _ in range(4)]
    out, lse = confidence.confidence_attention_forward(*inputs[:3], 2.0)
    gradients = confidence.confidence_attention_backward(inputs[3], *inputs[:3], out, lse, 2.0)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in inputs[:3]]
        expected = exact(*leaves, 2.0, dtype)[0]
        results.append(torch.autograd.grad(expected, leaves, inputs[3].to(dtype)))
    assert_at_most_twice(("dQ", "dK", "dV"), gradients, *results)


def test_same_bits_every_time(divide: Any, generator: torch.Generator) -> None:
    q = normal(generator, 2, 53, 19, dtype=torch.float32, layout="rows")
    for forward in (
        lambda: confidence.confidence_attention_forward(q, q, q, 0.5),
        lambda: class_rank.class_rank_attention_forward(q, q, 0.5),
    ):
        for a, b in zip(forward(), forward(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "numbers"), extremes.runs("class_rank_attention", "confidence_attention"), ids=str
)
@pytest.mark.thinned(always={"numbers": ["inf", "nan"]})
def test_numbers_of_any_size(case: Case, numbers: str, divide: Any) -> None:
    extremes.check(case, numbers, "triton")


@pytest.mark.parametrize("keys", [4096, 4099])
def test_the_choice_for_a_gpu_of_many_multiprocessors(
    keys: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Through ``cut``: 37 queries, which one program takes, of many keys."""
    monkeypatch.setattr(confidence, "limits", lambda device: (227 * 1024, 132))
    choices = confidence_tiles.tiles(torch.float16, 16, 227 * 1024).scores
    assert cut(choices, 1, 37, keys, 132, 16, split=True).splits > 8
    q, k = (normal(generator, 1, n, 16, dtype=torch.float16, layout="rows") for n in (37, keys))
    check(confidence.confidence_attention_forward(q, k, k, 0.25), q, k, k, scale=0.25)
    monkeypatch.setattr(class_rank, "limits", lambda device: (227 * 1024, 132))
    choices = class_rank_tiles.tiles(torch.float16, 19, 227 * 1024).forward
    assert cut(choices, 1, 515, 515, 132, split=True).splits > 4
    weights = normal(generator, 1, 515, 19, dtype=torch.float16, layout="rows").softmax(-1)
    found = class_rank.class_rank_attention_forward(weights, weights, 1.7)
    check(found, weights, weights, weights, scale=1.7)
