"""Models with a memory on two processes: what one process with the whole batch would do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mcibi_fast.compat.dataset_context import context_of
from tests.compat.dropin import without_dropout
from tests.compat.memory_in_decoders import K, scenes
from tests.models.ranks import two_ranks

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("torchvision", reason="needs torchvision")


def _torchvision() -> nn.Module:
    from tests.compat.test_memory_torchvision import build

    return build()


def _transformers() -> nn.Module:
    from tests.compat.test_memory_transformers import SMALL, adapter, segformer

    return adapter.with_mcibi(segformer(), **SMALL)


def _loss(call: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Called as a user does, with DistributedDataParallel around the model or without."""
    model: Any = call.module if isinstance(call, DistributedDataParallel) else call
    if hasattr(model, "config"):
        return call(pixel_values=images, labels=labels).loss
    logits = call(images)["out"]
    return F.cross_entropy(logits, labels) + model.mcibi_loss(labels)


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": _torchvision,
    "transformers": _transformers,
}
OPTIONS: list[dict[str, Any]] = [{}, {"find_unused_parameters": True}, {"static_graph": True}]
CASES = [(name, options, False) for name in BUILDS for options in OPTIONS]
CASES += [(name, {}, True) for name in BUILDS]  # in bfloat16


def trained(case: tuple[str, dict[str, Any], bool], rank: int | None = None) -> list[Tensor]:
    """Losses of three steps, then memory and parameters, as far as they have moved.

    Args:
        case: a model, the options of DistributedDataParallel, and whether it runs in bfloat16.
        rank: of this process, which takes half of the four images; None for all of them.
    """
    name, options, mixed = case
    dtype = torch.float32 if mixed else torch.float64
    model = without_dropout(BUILDS[name]()).to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # its statistics would be those of half the batch
            module.eval()
    states = [context_of(model).context.memory.memory, *model.parameters()]
    before = [state.detach().clone() for state in states]
    call = model if rank is None else DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    part = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    images, labels = (each[part] for each in scenes())
    labels = labels.where(labels < K, 0)  # as many valid pixels in each half
    losses = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = _loss(call, images.to(dtype), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert states[0].dtype == dtype
    moved = [(after.detach() - old) for after, old in zip(states, before, strict=True)]
    return [torch.stack(losses), *moved]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """No option of DistributedDataParallel is needed, and none is in the way."""
    with two_ranks(Path(__file__).with_name("memory_worker.py"), tmp_path):
        alone = {(name, mixed): trained((name, {}, mixed)) for name, _, mixed in CASES}
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for (name, _, mixed), *both in zip(CASES, *ranks, strict=True):
        losses, *moved = alone[name, mixed]
        tolerance = 0.02 if mixed else 1e-9
        assert bool(moved[0].any())
        assert float((sum(r[0] for r in both) / 2 - losses).norm()) <= tolerance * losses.norm()
        for rank in both:
            error = sum((a - b).square().sum() for a, b in zip(rank[1:], moved, strict=True))
            assert error.sqrt() <= tolerance * sum(b.square().sum() for b in moved).sqrt()
            assert (rank[1] - moved[0]).norm() <= tolerance * moved[0].norm()  # the memory
        assert all(torch.equal(a, b) for a, b in zip(both[0][1:], both[1][1:], strict=True))
