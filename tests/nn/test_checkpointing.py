"""torch.utils.checkpoint around what reads or updates a memory: the gradients of a run without."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcibi_fast import ops
from mcibi_fast.nn import DatasetLevelContext, GaussianMemory, RepresentationMemory

Z, K = 8, 5
MEMORIES: dict[str, Callable[[], GaussianMemory | RepresentationMemory]] = {
    "released": lambda: GaussianMemory(K, Z),
    "paper": lambda: GaussianMemory(K, Z, form="paper"),
    "poly": lambda: GaussianMemory(K, Z, momentum_schedule="poly"),
    "representations": lambda: RepresentationMemory(K, Z),
    "two each": lambda: RepresentationMemory(K, Z, 2),
}


class Plain(nn.Module):
    """Calls without checkpointing."""

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return function(*inputs)


def reentrant(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return checkpoint(function, *inputs, use_reentrant=True)


def saved_hooks(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return checkpoint(function, *inputs, use_reentrant=False)


def nested(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return saved_hooks(lambda *x: saved_hooks(function, *x), *inputs)


def nested_reentrant(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return reentrant(lambda *x: reentrant(function, *x), *inputs)


def to_the_end(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return checkpoint(function, *inputs, use_reentrant=False, early_stop=False)


MODES = [
    *[reentrant, saved_hooks],
    *[pytest.param(m, marks=pytest.mark.slow) for m in (nested, nested_reentrant, to_the_end)],
]
Run = Callable[..., Tensor]


def start(name: str, projections: str) -> tuple[DatasetLevelContext, list[Tensor], list[Tensor]]:
    """A context in float64, and the features and labels of two steps."""
    torch.manual_seed(0)
    memory = MEMORIES[name]().double()
    with torch.no_grad():
        memory.memory.copy_(torch.rand(memory.memory.shape) + 0.5)
    context = DatasetLevelContext(
        memory, transform_channels=6, projections=projections, dropout=0.0
    ).double()
    for module in context.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # a recomputation repeats the update of its running statistics
    features = [torch.randn(2, Z, 4, 5, dtype=torch.float64, requires_grad=True) for _ in "ab"]
    return context, features, [torch.randint(0, K, (2, 16, 20)) for _ in "ab"]


def gradients(context: nn.Module, features: list[Tensor]) -> list[Tensor]:
    found = [p.grad for p in context.parameters()] + [f.grad for f in features]
    return [g if g is not None else torch.zeros(()) for g in found]


def updated_after(name: str, projections: str, run: Run, order: str) -> list[Tensor]:
    """The update follows the forward, and only the context is checkpointed."""
    context, features, labels = start(name, projections)
    losses = []
    for R, label in zip(features, labels, strict=True):
        augmented = run(lambda x: context(x).features, R)
        context.memory.update(R.detach(), label)
        losses.append(augmented.square().sum())
        if order == "one by one":
            losses.pop().backward()
    if order == "in reverse":
        losses.reverse()
    if order == "together":
        losses = [sum(losses)]
    for loss in losses:
        loss.backward()
    return [*gradients(context, features), context.memory.memory]


@pytest.mark.parametrize("projections", ["paper", "released"])
@pytest.mark.parametrize("run", MODES)
@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.thinned(together=2)
def test_update_after_a_checkpointed_forward(name: str, run: Run, projections: str) -> None:
    expected = updated_after(name, projections, Plain(), "one by one")
    found = updated_after(name, projections, run, "one by one")
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", ["in order", "in reverse", "together"])
@pytest.mark.parametrize("run", [reentrant, saved_hooks])
@pytest.mark.parametrize("name", ["paper", "representations"])
def test_several_forwards_before_their_backwards(name: str, run: Run, order: str) -> None:
    expected = updated_after(name, "paper", Plain(), "together")
    for value, right in zip(updated_after(name, "paper", run, order), expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-12)


def updated_inside(name: str, run: Run) -> list[Tensor]:
    """Forward, update and loss are one checkpointed function, as a whole model is."""
    context, features, labels = start(name, "paper")
    memory, steps = context.memory, []
    ops.kept_rows()
    for R, label in zip(features, labels, strict=True):

        def step(x: Tensor, label: Tensor = label) -> Tensor:
            augmented = context(x).features
            with torch.no_grad():
                x = x.detach().clone()
                x[0, 0, 0, 0] = torch.inf  # one row is kept, and counted
            memory.update(x, label)
            return augmented.square().sum()

        run(step, R).backward()
        steps += [memory.memory.clone(), torch.tensor(ops.kept_rows())]
    state = getattr(memory, "noise_state", torch.zeros(()))
    return [*gradients(context, features), *steps, state]


@pytest.mark.parametrize("run", MODES)
@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.thinned(always={"run": [saved_hooks]})
def test_update_inside_a_checkpointed_function(name: str, run: Run) -> None:
    for value, right in zip(updated_inside(name, run), updated_inside(name, Plain()), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-12)


def test_retained_graphs_are_recomputed_each_time() -> None:
    context, (R, _), (label, _) = start("paper", "paper")
    found = []
    for run in (Plain(), saved_hooks):
        loss = run(lambda x: context(x).features, R).square().sum()
        for _ in range(2):
            context.memory.update(R.detach(), label)
            found.append(torch.autograd.grad(loss, R, retain_graph=True)[0])
        context.memory.reset_parameters()
        with torch.no_grad():
            context.memory.memory.copy_(torch.rand(K, 2, generator=torch.Generator()))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])


@pytest.mark.parametrize("run", [reentrant, saved_hooks])
def test_reading_before_and_after_the_update_in_one_function_is_refused(run: Run) -> None:
    context, (R, _), (label, _) = start("paper", "paper")

    def twice(x: Tensor) -> Tensor:
        first = context(x).features
        context.memory.update(x.detach(), label)
        return first + context(x).features

    loss = run(twice, R).square().sum()
    with pytest.raises(RuntimeError, match=r"^memory: .*checkpoint the two parts separately"):
        loss.backward()


def test_other_recomputations_after_an_update_are_refused() -> None:
    """Such as those of another library, whose calls are not known."""
    context, (R, _), (label, _) = start("paper", "paper")

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            with torch.no_grad():
                return context(x).features

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(context(x).features, x, grad)[0]

    expected = torch.autograd.grad(context(R).features.square().sum(), R)[0]
    torch.testing.assert_close(
        torch.autograd.grad(Again.apply(R).square().sum(), R)[0], expected
    )  # nothing was updated
    loss = Again.apply(R).square().sum()
    context.memory.update(R.detach(), label)
    with pytest.raises(RuntimeError, match=r"^memory: it was updated between the forward and"):
        loss.backward()


def test_what_is_read_is_saved_as_before() -> None:
    context, (R, _), _ = start("paper", "paper")
    context(R).features.square().sum().backward()
    assert not vars(context.memory.memory) and not vars(context.memory.noise_state)
    file = io.BytesIO()
    torch.save([context.memory.memory, context.memory.noise_state], file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)[0], context.memory.memory)


def compiled_step(name: str, run: Run, compiled: bool) -> list[Tensor]:
    context, (R, _), (label, _) = start(name, "paper")

    def step(x: Tensor) -> Tensor:
        augmented = run(lambda y: context(y).features, x)
        context.memory.update(x.detach(), label)
        return augmented.square().sum()

    torch._dynamo.reset()
    run_step = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
    run_step(R).backward()
    return [*gradients(context, [R]), context.memory.memory]


@pytest.mark.slow
@pytest.mark.parametrize("run", [reentrant, saved_hooks])
@pytest.mark.parametrize("name", ["paper", "representations"])
@pytest.mark.thinned
def test_compiled_steps(name: str, run: Run) -> None:
    expected = compiled_step(name, Plain(), compiled=False)
    for value, right in zip(compiled_step(name, run, compiled=True), expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("run", [reentrant, saved_hooks])
@pytest.mark.parametrize("name", ["paper", "representations"])
@pytest.mark.thinned
def test_a_compiled_context_in_a_checkpointed_call(name: str, run: Run) -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        context, (R, _), (label, _) = start(name, "paper")
        called = torch.compile(context, backend="aot_eager") if compiled else context
        loss = run(lambda x, called=called: called(x).features, R).square().sum()
        context.memory.update(R.detach(), label)
        loss.backward()
        results.append(gradients(context, [R]))
    for value, right in zip(*results, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-12)
