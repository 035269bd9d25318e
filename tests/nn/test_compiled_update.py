"""A training step in one compiled graph: the backward reads the memory of before the update."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcibi_fast import nn


def memories() -> dict[str, nn.GaussianMemory | nn.RepresentationMemory]:
    return {
        "released": nn.GaussianMemory(5, 8, form="released"),
        "paper": nn.GaussianMemory(5, 8, form="paper"),
        "representations": nn.RepresentationMemory(5, 8),
    }


def gradient(name: str, compiled: bool) -> Tensor:
    g = torch.Generator().manual_seed(0)
    memory = memories()[name].double()
    memory.memory.copy_(torch.rand(memory.memory.shape, generator=g) + 0.5)
    logits = torch.randn(1, 5, 4, 4, generator=g, dtype=torch.float64).requires_grad_()
    features = torch.randn(1, 8, 4, 4, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 5, (1, 8, 8), generator=g)

    def step(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        context = memory.aggregate(logits)
        memory.update(features, labels)
        return context.square().sum()

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    before = memory.memory.clone()
    run(logits, features, labels).backward()
    assert not torch.equal(memory.memory, before)
    assert logits.grad is not None
    return logits.grad


@pytest.mark.slow
@pytest.mark.parametrize("name", memories())
def test_gradient_of_a_compiled_step(name: str) -> None:
    torch._dynamo.reset()
    torch.testing.assert_close(gradient(name, True), gradient(name, False), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_the_momentum_may_change_in_compiled_code() -> None:
    """At every step, without compiling each value anew."""
    torch._dynamo.reset()
    compiled, plain = (nn.GaussianMemory(5, 8).double() for _ in "ab")
    update = torch.compile(compiled.update, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for step in range(6):
            g = torch.Generator().manual_seed(step)
            features = torch.randn(1, 8, 4, 4, generator=g, dtype=torch.float64)
            labels = torch.randint(0, 5, (1, 8, 8), generator=g)
            compiled.momentum = plain.momentum = 0.9 / (step + 1)
            update(features, labels)
            plain.update(features, labels)
            torch.testing.assert_close(compiled.memory, plain.memory, rtol=1e-12, atol=1e-14)
