"""A context that is called with labels: each optimiser step updates its memory once."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcibi_fast.nn import (
    DatasetLevelContext,
    DiagonalMemory,
    GaussianMemory,
    LearntMemory,
    RepresentationMemory,
)
from mcibi_fast.nn.class_memory import ClassMemory
from mcibi_fast.nn.fold import fold_context
from tests.models.ranks import two_ranks

Z, K = 8, 5
MEMORIES: dict[str, Callable[[], ClassMemory]] = {
    "released": lambda: GaussianMemory(K, Z),
    "paper": lambda: GaussianMemory(K, Z, form="paper"),
    "poly": lambda: GaussianMemory(K, Z, momentum_schedule="poly"),
    "fixed": lambda: GaussianMemory(K, Z, form="paper", fixed=True),
    "diagonal": lambda: DiagonalMemory(K, Z),
    "representations": lambda: RepresentationMemory(K, Z),
    "mean": lambda: RepresentationMemory(K, Z, strategy="mean"),
}


def build(name: str = "paper", dtype: torch.dtype = torch.float64) -> DatasetLevelContext:
    torch.manual_seed(0)
    memory = MEMORIES[name]()
    with torch.no_grad():
        memory.memory.copy_(torch.rand(memory.memory.shape) + 0.5)
    context = DatasetLevelContext(memory, transform_channels=4, dropout=0.0, projections="paper")
    return context.to(dtype)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(2, Z, 4, 5, generator=g, dtype=dtype)
    return features.requires_grad_(), torch.randint(0, K, (2, 16, 20), generator=g)


def loss_of(context: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
    augmented, weight_logits = context(features, labels=labels)
    return augmented.square().mean() + weight_logits.square().mean()


def sgd(context: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(context.parameters(), lr=0.01)


def state(memory: ClassMemory) -> list[Tensor]:
    noise = getattr(memory, "noise_state", torch.zeros(()))
    return [memory.memory.clone(), noise.clone()]


def updated(name: str, *batches: tuple[Tensor, Tensor]) -> list[Tensor]:
    """What one explicit update on the whole batch makes of a new memory."""
    memory = build(name).memory
    features, labels = (torch.cat([b[i].detach() for b in batches]) for i in (0, 1))
    memory.update(features, labels)
    return state(memory)


def check(memory: ClassMemory, expected: list[Tensor]) -> None:
    for value, right in zip(state(memory), expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", MEMORIES)
def test_each_step_is_one_update_by_all_of_its_micro_batches(name: str) -> None:
    context = build(name)
    optimizer, memory = sgd(context), context.memory
    before = state(memory)
    for seed in range(3):
        loss_of(context, *batch(seed)).backward()
        assert torch.equal(memory.memory, before[0])  # not before the step
    optimizer.step()
    check(memory, updated(name, *map(batch, range(3))))
    optimizer.step()  # nothing new was seen
    check(memory, updated(name, *map(batch, range(3))))


def test_labels_change_no_output_and_no_gradient() -> None:
    results = []
    for labels in (None, batch(0)[1]):
        context, R = build(), batch(0)[0]
        augmented, weight_logits = context(R, labels=labels)
        (augmented.square().sum() + weight_logits.square().sum()).backward()
        results.append([augmented, weight_logits, R.grad, *(p.grad for p in context.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    augmented.relu_()  # as a module after it may do


@pytest.mark.parametrize("part", [0, 1])
def test_a_loss_of_either_output_is_enough(part: int) -> None:
    context = build()
    optimizer, (R, labels) = sgd(context), batch(0)
    context(R, labels=labels)[part].sum().backward()
    optimizer.step()
    check(context.memory, updated("paper", batch(0)))


def test_two_forwards_before_their_backward() -> None:
    context = build()
    optimizer = sgd(context)
    (loss_of(context, *batch(0)) + loss_of(context, *batch(1))).backward()
    optimizer.step()
    check(context.memory, updated("paper", batch(0), batch(1)))


def test_a_retained_graph_counts_once() -> None:
    context = build()
    optimizer = sgd(context)
    loss = loss_of(context, *batch(0))
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    check(context.memory, updated("paper", batch(0)))


def test_a_forward_without_a_backward_leaves_nothing() -> None:
    context = build()
    optimizer, (R, labels) = sgd(context), batch(1)
    kept_alive = [weakref.ref(R), weakref.ref(labels), weakref.ref(loss_of(context, R, labels))]
    del R, labels
    gc.collect()
    assert [ref() for ref in kept_alive] == [None] * 3
    with torch.no_grad():
        loss_of(context, *batch(2))
    loss_of(context.eval(), *batch(3)).backward()
    context.train()
    optimizer.step()
    check(context.memory, state(build().memory))
    loss_of(context, *batch(0)).backward()
    optimizer.step()
    check(context.memory, updated("paper", batch(0)))


@pytest.mark.parametrize("place", ["before backward", "after backward", "after step"])
@pytest.mark.parametrize("name", ["paper", "representations"])
def test_an_explicit_update_takes_the_place_of_the_automatic_one(name: str, place: str) -> None:
    context = build(name)
    optimizer, (R, labels) = sgd(context), batch(0)
    loss = loss_of(context, R, labels)
    if place == "before backward":
        context.memory.update(R.detach(), labels)
    loss.backward()
    if place == "after backward":
        context.memory.update(R.detach(), labels)
    optimizer.step()
    if place == "after step":
        context.memory.update(R.detach(), labels)
    check(context.memory, updated(name, batch(0)))
    loss_of(context, *batch(1)).backward()  # the next step is automatic again
    before = context.memory.memory.clone()
    optimizer.step()
    assert not torch.equal(context.memory.memory, before)
    before = context.memory.memory.clone()
    context.memory.update(*batch(2))  # and other features count, also twice
    once = context.memory.memory.clone()
    assert not torch.equal(once, before)
    context.memory.update(*batch(2))
    assert not torch.equal(context.memory.memory, once)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant: bool) -> None:
    context = build()
    optimizer, (R, labels) = sgd(context), batch(0)
    loss = checkpoint(lambda x: loss_of(context, x, labels), R, use_reentrant=reentrant)
    loss.backward()
    optimizer.step()
    check(context.memory, updated("paper", batch(0)))


def test_only_an_optimiser_of_the_context_counts() -> None:
    context, other = build(), nn.Linear(2, 2)
    discriminator, generator = sgd(other), sgd(context)
    loss_of(context, *batch(0)).backward()
    discriminator.step()
    check(context.memory, state(build().memory))
    generator.step()
    check(context.memory, updated("paper", batch(0)))
    frozen = build().requires_grad_(False)  # then its features are learnt, by any optimiser
    loss_of(frozen, *batch(0)).backward()
    discriminator.step()
    check(frozen.memory, updated("paper", batch(0)))
    by_hand = build()
    loss_of(by_hand, *batch(0)).backward()
    by_hand.memory.learn()
    check(by_hand.memory, updated("paper", batch(0)))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_poly_momentum_follows_the_learning_rate_of_its_optimiser(frozen: bool) -> None:
    factors = [0.5, 1.0, 0.25, 0.0]
    context = build("poly").requires_grad_(not frozen)
    learnt = torch.nn.Linear(2, 2) if frozen else context
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)  # of no interest, if not frozen
    optimizer = torch.optim.SGD([{"params": learnt.parameters(), "lr": 0.3}], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [*factors, 1.0][step])
    expected = build("poly").memory
    for step, factor in enumerate(factors):
        loss_of(context, *batch(step)).backward()
        if not frozen:
            other.step()
        optimizer.step()
        scheduler.step()
        assert context.memory.momentum == pytest.approx(0.1 * factor)
        expected.momentum = 0.1 * factor
        expected.update(batch(step)[0].detach(), batch(step)[1])
        check(context.memory, state(expected))


def test_a_schedule_by_hand_comes_first() -> None:
    context = build("poly")
    optimizer = sgd(context)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    context.memory.schedule(lr_factor=0.75)
    loss_of(context, *batch(0)).backward()
    optimizer.step()
    assert context.memory.momentum == pytest.approx(0.075)


def test_one_cycle_is_relative_to_its_largest_learning_rate() -> None:
    context = build("poly")
    optimizer = sgd(context)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=10, pct_start=0.2)
    for step in range(2):
        rate = optimizer.param_groups[0]["lr"]
        loss_of(context, *batch(step)).backward()
        optimizer.step()
        scheduler.step()
        assert context.memory.momentum == pytest.approx(0.1 * rate / 0.4)
    assert rate == pytest.approx(0.4)


def test_a_poly_memory_that_nothing_schedules_warns() -> None:
    context = build("poly")
    optimizer = sgd(context)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        context.memory.update(*batch(0))
        optimizer.step()  # with the initial learning rate
    scheduler.step()
    with pytest.warns(UserWarning, match="with 'poly' call model.schedule"):
        optimizer.step()
    context.memory.schedule(lr_factor=0.75)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_step_that_the_scaler_skips_updates_nothing() -> None:
    context = build(dtype=torch.float32)
    optimizer, scaler = sgd(context), torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(context, *batch(0, torch.float32))
    scaler.scale(loss * torch.inf).backward()
    scaler.step(optimizer)
    assert torch.equal(context.memory.memory, build(dtype=torch.float32).memory.memory)
    assert context.memory.memory.dtype == torch.float32


def test_copies_start_with_nothing_and_can_be_saved() -> None:
    context = build()
    loss_of(context, *batch(0)).backward()
    file = io.BytesIO()
    torch.save(context, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    average = copy.deepcopy(context).requires_grad_(False)
    sgd(context).step()
    check(average.memory, state(build().memory))
    check(saved.memory, state(build().memory))
    for copied in (average.requires_grad_(True), saved):
        optimizer = sgd(copied)
        loss_of(copied, *batch(0)).backward()
        optimizer.step()
        check(copied.memory, updated("paper", batch(0)))


@pytest.mark.parametrize("name", MEMORIES)
def test_a_context_that_was_built_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        built = DatasetLevelContext(MEMORIES[name](), transform_channels=4, dropout=0.0)
    context = built.to_empty(device="cpu").eval().train()
    assert context.memory._kept is not None  # before a compiler sees it
    context.memory.reset_parameters()
    for parameter in context.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    optimizer = sgd(context)
    loss_of(context, *batch(0, torch.float32)).backward()
    optimizer.step()
    expected = MEMORIES[name]()
    expected.update(*batch(0, torch.float32))
    torch.testing.assert_close(context.memory.memory, expected.memory)


def test_a_learnt_memory_is_left_to_the_optimiser() -> None:
    context = DatasetLevelContext(LearntMemory(K, Z), transform_channels=4).double()
    optimizer = sgd(context)
    loss_of(context, *batch(0)).backward()
    expected = context.memory.memory - 0.01 * context.memory.memory.grad
    optimizer.step()
    torch.testing.assert_close(context.memory.memory, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "representations"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.thinned
def test_compiled_steps(name: str, backend: str) -> None:
    torch._dynamo.reset()
    context = build(name)
    optimizer = sgd(context)
    step = torch.compile(
        lambda R, labels: loss_of(context, R, labels), fullgraph=True, backend=backend
    )
    step(*batch(2))  # no backward
    (step(*batch(0)) + step(*batch(1))).backward()
    optimizer.step()
    check(context.memory, updated(name, batch(0), batch(1)))
    loss = step(*batch(2))
    context.memory.update(*batch(0))
    expected = state(context.memory)
    loss.backward()
    optimizer.step()
    check(context.memory, expected)


@pytest.mark.slow
def test_two_processes_pool_what_their_micro_batches_left(tmp_path: Path) -> None:
    with two_ranks(Path(__file__).with_name("observing_worker.py"), tmp_path):
        pass
    for i, name in enumerate(("paper", "representations")):
        memory = build(name).memory
        for step in range(2):
            four = [batch(4 * step + j) for j in range(4)]
            features, labels = (torch.cat([b[k].detach() for b in four]) for k in (0, 1))
            memory.update(features, labels)
        for rank in (0, 1):
            check(memory, torch.load(tmp_path / f"{rank}.pt")[i])


def test_a_folded_context_takes_labels_as_well() -> None:
    context = build().eval()
    R, labels = batch(0)
    folded = fold_context(copy.deepcopy(context))
    with torch.no_grad():
        assert torch.equal(folded(R, labels=labels).features, folded(R).features)
