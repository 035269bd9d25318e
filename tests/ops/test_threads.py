"""Results and gradients with any number of threads, at sizes that are divided among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Generator, Tensor

from mcibi_fast import ops

G = Generator().manual_seed(0)
K = 19
LOGITS = torch.randn(2, K, 33, 35, generator=G)
LABELS = torch.randint(0, K, (2, 260, 270), generator=G)
WEIGHT = torch.rand(K, generator=G)
ROWS = torch.randn(2, 2048, K, generator=G)
EPS = torch.randn(K, 32, generator=G)
MEMORY = torch.rand(K, 2, generator=G)

CALLS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "cross entropy, mean": (lambda x: ops.upsample_cross_entropy(x, LABELS), LOGITS),
    "cross entropy, weighted mean": (
        lambda x: ops.upsample_cross_entropy(x, LABELS, weight=WEIGHT),
        LOGITS,
    ),
    "cross entropy, sum": (
        lambda x: ops.upsample_cross_entropy(x, LABELS, reduction="sum"),
        LOGITS,
    ),
    "class-rank attention": (
        lambda x: ops.class_rank_attention(x, ROWS.softmax(-1), scale=1.3),
        ROWS,
    ),
    "hard class-rank attention": (
        lambda x: ops.class_rank_attention(x, ROWS, scale=1.3, hard=True),
        ROWS,
    ),
    "aggregation": (lambda x: ops.gaussian_aggregate(x, MEMORY, 32, noise=EPS), LOGITS),
    "class sums": (lambda x: ops.class_feature_sums(x, LABELS, K)[0], LOGITS),
    "memory update": (lambda x: ops.memory_update(MEMORY, x, LABELS), LOGITS),
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_same_bits(name: str, turned: bool) -> None:
    call, tensor = CALLS[name]
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        leaf = tensor.clone().requires_grad_()
        result = call(leaf)
        cotangent = torch.linspace(-1, 1, result.numel()).reshape(result.shape)
        if turned and result.dim() > 1:
            cotangent = cotangent.mT.contiguous().mT
        (grad,) = torch.autograd.grad(result, leaf, cotangent)
        results.append((result.detach(), grad))
    for result, grad in results[1:]:
        assert torch.equal(result, results[0][0])
        assert torch.equal(grad, results[0][1])
