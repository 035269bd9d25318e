"""Forward mode and the transforms of ``torch.func``: every op against the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import mcibi_fast
from mcibi_fast import ops
from tests.ops.table import CASES, SMALL, Case, eager

LEARNT = [case for case in CASES if case.differentiable]
SMALL_LEARNT = [case for case in SMALL if case.differentiable]
BACKENDS = ("auto", "reference")


def split(case: Case, call: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The op as a function of its differentiable arguments, and those."""
    args = case.args()

    def function(*learnt: Tensor) -> Tensor:
        given = dict(zip(case.differentiable, learnt, strict=True))
        return call(case, [given.get(i, a) for i, a in enumerate(args)])

    return function, [args[i] for i in case.differentiable]


def op_of(case: Case) -> tuple[Callable[..., Tensor], list[Tensor]]:
    return split(case, lambda c, args: c.call(*args))


def pytorch_of(case: Case) -> Callable[..., Tensor]:
    return split(case, eager)[0]


def directions(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(2)
    return tuple(torch.randn(t.shape, generator=g, dtype=t.dtype) for t in inputs)


def same(got: Any, want: Any, case: Case) -> None:
    bound = 10 * case.tolerance
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


@pytest.fixture(params=BACKENDS, autouse=True)
def chosen(request: pytest.FixtureRequest) -> Any:
    with mcibi_fast.backend(request.param):
        yield


@pytest.mark.parametrize("case", LEARNT, ids=str)
def test_jvp(case: Case) -> None:
    function, inputs = op_of(case)
    tangents = directions(inputs)
    want, truth = torch.func.jvp(pytorch_of(case), tuple(inputs), tangents)
    assert truth.any() or case.note in ("one", "one-class", "one-key", "one-pixel", "one-feature")
    got, tangent = torch.func.jvp(function, tuple(inputs), tangents)
    same((got, tangent), (want, truth), case)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, v) for t, v in zip(inputs, tangents, strict=True)]
        result = forward_ad.unpack_dual(function(*duals))
    same((result.primal, result.tangent), (want, truth), case)


@pytest.mark.parametrize("case", SMALL_LEARNT, ids=str)
def test_jacobians(case: Case) -> None:
    function, inputs = op_of(case)
    argnums = tuple(range(len(inputs)))
    truth = torch.func.jacrev(pytorch_of(case), argnums)(*inputs)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        same(jacobian(function, argnums)(*inputs), truth, case)


@pytest.mark.parametrize("case", SMALL_LEARNT, ids=str)
def test_linearize(case: Case) -> None:
    function, inputs = op_of(case)
    tangents = directions(inputs)
    _, linear = torch.func.linearize(function, *inputs)
    same(linear(*tangents), torch.func.jvp(pytorch_of(case), tuple(inputs), tangents)[1], case)


@pytest.mark.parametrize("case", LEARNT, ids=str)
def test_grad_and_its_vmap(case: Case) -> None:
    function, inputs = op_of(case)
    argnums = tuple(range(len(inputs)))

    def gradients(call: Callable[..., Tensor]) -> Callable[..., Any]:
        return torch.func.grad(lambda *x: call(*x).square().sum(), argnums)

    got, want = gradients(function), gradients(pytorch_of(case))
    same(got(*inputs), want(*inputs), case)
    several = [torch.stack([t, 0.5 * t, -t]) for t in inputs]
    each = [want(*(t[i] for t in several)) for i in range(3)]
    stacked = tuple(torch.stack(grads) for grads in zip(*each, strict=True))
    same(torch.func.vmap(got)(*several), stacked, case)


@pytest.mark.parametrize("case", SMALL_LEARNT, ids=str)
def test_gradients_of_each_sample(case: Case) -> None:
    """vmap(grad) over whatever has samples, the labels among them."""
    args = case.args()
    batched = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim() > 2]
    dims = tuple(0 if i in batched else None for i in range(len(args)))
    samples = [a.unsqueeze(1) if i in batched else a for i, a in enumerate(args)]

    def gradients(call: Callable[..., Tensor]) -> Callable[..., Any]:
        return torch.func.grad(lambda *a: call(*a).square().sum(), case.differentiable)

    got = torch.func.vmap(gradients(case.call), in_dims=dims)(*samples)
    want = gradients(lambda *a: eager(case, list(a)))
    each = [want(*(a[b] if i in batched else a for i, a in enumerate(samples))) for b in (0, 1)]
    same(got, tuple(torch.stack(grads) for grads in zip(*each, strict=True)), case)


@pytest.mark.parametrize("case", SMALL_LEARNT, ids=str)
def test_hessian_vector_products(case: Case) -> None:
    function, inputs = op_of(case)
    tangents = directions(inputs)
    argnums = tuple(range(len(inputs)))

    def product(call: Callable[..., Tensor]) -> Any:
        gradient = torch.func.grad(lambda *x: call(*x).square().sum(), argnums)
        return torch.func.jvp(gradient, tuple(inputs), tangents)[1]

    same(product(function), product(pytorch_of(case)), case)


@pytest.mark.slow
def test_compiled_transforms() -> None:
    logits, labels = torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64)

    def loss(x: Tensor) -> Tensor:
        return ops.upsample_cross_entropy(x, labels)

    def dual(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, x))).tangent

    for transform in (
        torch.func.grad(loss),
        lambda x: torch.func.jvp(loss, (x,), (x,))[1],
        lambda x: torch.func.vmap(torch.func.grad(loss))(x[None]),
        dual,
    ):
        torch._dynamo.reset()
        compiled = torch.compile(transform, fullgraph=True, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(logits), transform(logits))


def test_the_memory_is_differentiated_where_a_transform_asks() -> None:
    """Autograd leaves the memory out; under torch.func that would read as a gradient of zero."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 2, 2, generator=g, dtype=torch.float64)
    memory = torch.rand(3, 2, generator=g, dtype=torch.float64)
    eps = torch.randn(3, 5, generator=g, dtype=torch.float64)

    def table(M: Tensor) -> Tensor:
        return M[:, :1] + M[:, 1:] * eps

    def gathered(M: Tensor) -> Tensor:
        return torch.einsum("bkhw,kz->bzhw", logits.softmax(1), table(M))

    for function, truth in (
        (lambda M: ops.gaussian_table(M, 5, noise=eps), table),
        (lambda M: ops.gaussian_aggregate(logits, M, 5, noise=eps), gathered),
    ):
        want = torch.func.jacrev(truth)(memory)
        assert want.any()
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(jacobian(function)(memory), want)


def test_what_has_no_derivative_says_so() -> None:
    logits, labels = torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64)

    def loss(weight: Tensor) -> Tensor:
        return ops.upsample_cross_entropy(logits, labels, weight=weight)

    message = "upsample_cross_entropy: has no derivative with respect to weight"
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(loss)(torch.ones(3))
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(loss, (torch.ones(3),), (torch.ones(3),))


def test_a_wrong_label_is_an_error_under_vmap_too() -> None:
    logits = torch.randn(2, 1, 3, 2, 2)
    labels = torch.zeros(2, 1, 4, 4, dtype=torch.int64)
    labels[1, 0, 2, 3] = 7
    gradient = torch.func.grad(ops.upsample_cross_entropy)
    with pytest.raises(ValueError, match=r"value 7 at \(b=0, y=2, x=3\)"):
        torch.func.vmap(gradient)(logits, labels)
