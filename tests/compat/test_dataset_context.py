"""The classifier with a dataset-level context, on its own: two processes, compiled, poolings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mcibi_fast.compat.dataset_context import ContextClassifier, insert
from mcibi_fast.nn import GaussianMemory


class Net(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Sequential(nn.Dropout2d(0.0), nn.Conv2d(8, 5, 1))
        self.placed = (insert(self, "head.1", {"transform_channels": 4} | options),)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.body(images))
        return logits.square().mean() + self.placed[0].loss(labels)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 16, 16, generator=g), torch.randint(0, 5, (2, 16, 16), generator=g)


def test_the_memory_learns_from_what_the_model_classifies() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    images, labels = batch(0)
    expected = GaussianMemory(5, 8)
    expected.update(net.body(images).detach(), labels)
    net(images, labels).backward()
    optimizer.step()
    torch.testing.assert_close(net.placed[0].context.memory.memory, expected.memory)


@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("form", ["paper", "released"])
def test_stages_and_poolings(form: str, pool: int) -> None:
    head = ContextClassifier(
        nn.Conv2d(8, 5, 3, padding=1), form=form, transform_channels=6, pool=pool, stages=2
    ).eval()
    R = torch.randn(2, 8, 7, 9)
    with torch.no_grad():
        two = head(R)
        head.stages = 1
        one = head(R)
        small = nn.functional.avg_pool2d(R, pool, ceil_mode=True)
        W = head.context.weight_head(small)
        W = head._next_weights(W, one)
        context = nn.functional.interpolate(
            head.context.aggregate(small, W), R.shape[2:], mode="bilinear"
        )
        expected = head.classifier(head.context.fuse(head.context.fuse.prepare(R), context))
    assert two.shape == (2, 5, 7, 9)
    torch.testing.assert_close(two, expected)


@pytest.mark.slow
def test_compiled() -> None:
    torch._dynamo.reset()
    memories = []
    for compiled in (False, True):
        net = Net(context_dropout=0.0)
        call = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(2):
            call(*batch(2 * step)).backward()
            call(*batch(2 * step + 1)).backward()
            optimizer.step()
        memories.append(net.placed[0].context.memory.memory)
    torch.testing.assert_close(*memories)
    assert bool((memories[0][:, 0] != 0).all())
