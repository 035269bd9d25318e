"""The released structure computes what ours does, and waits as often as the released code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import released_structure as released
from benchmarks.host_syncs import HostSyncs
from mcibi_fast.models import MCIBIPPHead
from mcibi_fast.nn import GaussianMemory

K, Z, SIZE = 7, 16, 5


def head_of(form: str, **options: Any) -> MCIBIPPHead:
    """A small head with the same weights in every run."""
    options = {"feats_channels": Z, "transform_channels": 8, "dropout": 0.0, **options}
    head = MCIBIPPHead(K, [12, 20], form=form, noise="released", **options).double()
    g = torch.Generator().manual_seed(1)
    for parameter in head.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    head.memory.memory.copy_(torch.rand(K, 2, generator=g))
    return head


def features_of(generator: torch.Generator) -> list[Tensor]:
    return [
        torch.randn(2, c, SIZE, SIZE, generator=generator, dtype=torch.float64) for c in (12, 20)
    ]


def labels_of(generator: torch.Generator) -> Tensor:
    labels = torch.randint(0, K - 1, (2, 37, 41), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return labels


FORMS = [
    ("paper", {}),
    ("released", {}),
    ("released", {"hard": True}),
    ("paper", {"hard": True, "fusion": "add"}),
    ("released", {"downsample": True, "align_corners": True}),
    ("paper", {"auxiliary_weight": 0.0}),
]


@pytest.mark.parametrize(("form", "options"), FORMS, ids=str)
def test_a_training_step_equals_ours(
    form: str, options: dict[str, Any], generator: torch.Generator
) -> None:
    head = head_of(form, **options).train()
    features, labels = features_of(generator), labels_of(generator)
    before = head.memory.memory.clone()
    results = []
    for module in (head, released.ReleasedHead(head)):
        head.memory.memory.copy_(before)
        head.zero_grad()
        inputs = [f.clone().requires_grad_() for f in features]
        output = module.train()(inputs, labels)
        torch.stack(list(output.losses.values())).sum().backward()
        grads = [p.grad for p in (*inputs, *head.parameters()) if p.grad is not None]
        memory = head.memory.memory.clone()
        results.append(
            [output.logits, output.weight_logits, memory, *grads, *output.losses.values()]
        )
    assert len(results[0]) > 20 and not torch.equal(before, results[0][2])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_iterated_inference_equals_ours(form: str, generator: torch.Generator) -> None:
    head = head_of(form).eval()
    features = features_of(generator)
    theirs = released.ReleasedHead(head).eval()
    logits = None
    for stages in (1, 2, 3):
        logits = theirs(features, previous_logits=logits).logits
        torch.testing.assert_close(logits, head(features, stages=stages).logits)


def test_it_waits_for_the_device_as_often_as_the_released_code(generator: torch.Generator) -> None:
    memory = GaussianMemory(150, Z)
    with HostSyncs() as syncs:
        released.sample(memory, torch.empty(1))
    assert syncs.total == 2 * 150  # one more is the table's transfer to a GPU
    labels = torch.randint(0, 9, (1, 37, 41), generator=generator)
    with HostSyncs() as syncs:
        released.update(memory, torch.randn(1, Z, 5, 5, generator=generator), labels)
    assert syncs.total == 6 * 9 + 1
    with HostSyncs() as syncs:
        memory.update(torch.randn(1, Z, 5, 5, generator=generator), labels)
    assert syncs.total == 0


def test_noise_that_a_loop_cannot_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="noise='released'"):
        released.sample(GaussianMemory(3, Z, noise="fixed"), torch.empty(1))


def test_what_counts_as_a_wait() -> None:
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    with HostSyncs() as syncs:
        values[mask]
        values.masked_select(mask)
        mask.nonzero()
        values[0].item()
        bool(mask.any())
        values[torch.tensor([0, 2])]  # an index that is no mask has a known size
        values.masked_fill(mask, 0.0)
        torch.where(mask, values, -values)
    assert syncs.total == 5
    assert syncs.calls["aten::index.Tensor"] == 1
