"""What must hold for every op, driven by the table of ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mcibi_fast
from mcibi_fast.ops.dispatch import _ops
from tests.ops.table import CASES, HARD, SMALL, Case, eager

LAYOUTS = ("contiguous", "channels_last", "strided")
LOW = (torch.float32, torch.bfloat16, torch.float16)
RUNS = [(c, b) for c in [*CASES, HARD] for b in c.backends()]
LEARNT = [(c, b) for c, b in RUNS if c.differentiable]
# Triton takes no float64.
LEARNT_LOW = [(c, b) for c in CASES if c.differentiable for b in c.backends(torch.float32)]
SMALL_LEARNT = [(c, b) for c in SMALL if c.differentiable for b in (*c.backends(), "reference")]


def error(result: Tensor, truth: Tensor) -> float:
    """Relative error in the Euclidean norm; absolute where the truth is zero."""
    size = float(truth.norm())
    return float((result.double() - truth).norm()) / (size or 1.0)


def reference(case: Case, args: list[Any]) -> Tensor:
    with mcibi_fast.backend("reference"):
        return case.call(*args)


def with_gradient(case: Case, args: list[Any], cotangent: Tensor) -> list[Tensor]:
    """The result and the gradients of the differentiable arguments."""
    leaves = [
        a.detach().requires_grad_() if i in case.differentiable else a for i, a in enumerate(args)
    ]
    result = case.call(*leaves)
    inputs = [leaves[i] for i in case.differentiable]
    grads = torch.autograd.grad(result, inputs, cotangent.to(result.dtype))
    return [result.detach(), *grads]


def yardstick(case: Case, args: list[Any], cotangent: Tensor, fused: bool = False) -> list[Tensor]:
    leaves = [
        a.detach().requires_grad_() if i in case.differentiable else a for i, a in enumerate(args)
    ]
    result = eager(case, leaves, fused)
    inputs = [leaves[i] for i in case.differentiable]
    grads = torch.autograd.grad(result, inputs, cotangent.to(result.dtype))
    return [result.detach(), *grads]


def cotangent_for(case: Case, args: list[Any]) -> Tensor:
    shape = reference(case, args).shape
    g = torch.Generator().manual_seed(1)
    cotangent = torch.randn(shape, generator=g, dtype=torch.float64).bfloat16().double()
    return cotangent.to(args[0].device)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "backend"), RUNS, ids=str)
def test_equals_the_reference_in_float64(
    case: Case, backend: str, layout: str, poison: None
) -> None:
    args = case.args(torch.float64, layout)
    with mcibi_fast.backend(backend):
        result = case.call(*args)
    torch.testing.assert_close(
        result, reference(case, case.args()), rtol=case.tolerance, atol=case.tolerance
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "backend"), LEARNT, ids=str)
@pytest.mark.thinned
def test_gradients_equal_the_reference_in_float64(
    case: Case, backend: str, layout: str, poison: None
) -> None:
    cotangent = cotangent_for(case, case.args())
    with mcibi_fast.backend("reference"):
        truth = with_gradient(case, case.args(), cotangent)
    with mcibi_fast.backend(backend):
        results = with_gradient(case, case.args(torch.float64, layout), cotangent)
    for result, true in zip(results, truth, strict=True):
        bound = 10 * case.tolerance
        torch.testing.assert_close(result, true, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("case", "backend"), LEARNT_LOW, ids=str)
def test_error_is_at_most_twice_pytorchs(
    case: Case, backend: str, dtype: torch.dtype, poison: None
) -> None:
    cotangent = cotangent_for(case, case.args())
    with mcibi_fast.backend("reference"):
        truth = with_gradient(case, case.args(), cotangent)
    # SDPA's own rounding is PyTorch's too, and not ours to better.
    bars = [0.0] * len(truth)
    for fused in (False, True) if backend == "sdpa" else (False,):
        results = yardstick(case, case.args(dtype), cotangent, fused)
        bars = [max(b, error(r, t)) for b, r, t in zip(bars, results, truth, strict=True)]
    # One unit of rounding is allowed where PyTorch happens to be exact.
    unit = torch.finfo(dtype).eps / 2
    for layout in LAYOUTS:
        with mcibi_fast.backend(backend):
            results = with_gradient(case, case.args(dtype, layout), cotangent)
        for result, true, bar in zip(results, truth, bars, strict=True):
            assert error(result, true) <= 2 * bar + unit


def unordered(args: list) -> float:
    """PyTorch's own float64 upsampling on CUDA adds in no fixed order; ours has one (a test)."""
    return 1e-10 if args[0].device.type == "cuda" else 0.0


@pytest.mark.parametrize(("case", "backend"), SMALL_LEARNT, ids=str)
def test_gradcheck(case: Case, backend: str) -> None:
    args = case.args()
    for i in case.differentiable:
        args[i] = args[i].requires_grad_()
    with mcibi_fast.backend(backend):
        assert torch.autograd.gradcheck(case.call, args, nondet_tol=unordered(args))


class Called(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("case", "backend"), [(c, b) for c, b in LEARNT if b in ("cpu", "cuda")], ids=str
)
def test_backward_forms_no_gradient_of_the_second_result(case: Case, backend: str) -> None:
    """PyTorch makes zeros for it, as large as it is, where it is not told to leave that."""
    args = case.args(torch.float32)
    for i in case.differentiable:
        args[i] = args[i].requires_grad_()
    with mcibi_fast.backend(backend):
        result = case.call(*args)
        cotangent = torch.ones_like(result)
        with Called() as called:
            torch.autograd.grad(result, [args[i] for i in case.differentiable], cotangent)
    assert called.names
    assert not [name for name in called.names if "zeros" in name]


class NoGradient(torch.autograd.Function):
    """Its backward says that nothing needs a gradient."""

    @staticmethod
    def forward(ctx: Any, result: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> None:
        return None


@pytest.mark.parametrize(("case", "backend"), SMALL_LEARNT, ids=str)
def test_no_gradient_from_above_is_none_below(case: Case, backend: str) -> None:
    args = case.args()
    for i in case.differentiable:
        args[i] = args[i].requires_grad_()
    with mcibi_fast.backend(backend):
        NoGradient.apply(case.call(*args)).sum().backward()
    assert all(args[i].grad is None for i in case.differentiable)


@pytest.mark.parametrize(("case", "backend"), SMALL_LEARNT, ids=str)
def test_double_backward_is_right_or_refused(case: Case, backend: str) -> None:
    args = case.args()
    for i in case.differentiable:
        args[i] = args[i].requires_grad_()
    refusal = ""
    with mcibi_fast.backend(backend):
        try:
            assert torch.autograd.gradgradcheck(case.call, args, nondet_tol=unordered(args))
        except RuntimeError as error:
            refusal = str(error)
    words = (
        "cannot be differentiated twice",
        "backward_for_cpu is not implemented",
        "backward is not implemented",
    )
    assert not refusal or any(w in refusal for w in words)


@pytest.mark.parametrize("case", [*SMALL, HARD], ids=str)
def test_opcheck(case: Case) -> None:
    op = _ops[case.name]
    assert op.public is not None
    args = list(op.prepare(*case.args(), **case.options))
    for i in case.differentiable:
        args[i] = args[i].clone().requires_grad_()
    torch.library.opcheck(op.call, tuple(args))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.thinned
def test_compiles_as_one_graph(case: Case, layout: str) -> None:
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager", dynamic=False)
    args, cotangent = case.args(torch.float32, layout), cotangent_for(case, case.args())

    def run(call: Any) -> list[Tensor]:
        leaves = [
            a.detach().requires_grad_() if i in case.differentiable else a
            for i, a in enumerate(args)
        ]
        result = call(*leaves)
        if not case.differentiable:
            return [result]
        inputs = [leaves[i] for i in case.differentiable]
        return [result, *torch.autograd.grad(result, inputs, cotangent.to(result.dtype))]

    for got, want in zip(run(compiled), run(case.call), strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_backend_is_chosen_when_a_compiled_op_runs(case: Case) -> None:
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager", dynamic=False)
    args = case.args(torch.float32)
    first = compiled(*args)
    with mcibi_fast.backend("reference"):
        second = compiled(*args)
    torch.testing.assert_close(first, second)
    devices = ("cpu",) if args[0].is_cuda else ("cuda", "triton")
    elsewhere = [k.backend for k in _ops[case.name].kernels if k.backend in devices]
    assert elsewhere or args[0].is_cuda
    for backend in elsewhere:
        with (
            mcibi_fast.backend(backend),
            pytest.raises(mcibi_fast.ops.BackendError, match=case.name),
        ):
            compiled(*args)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_exports(case: Case) -> None:
    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Tensor:
            return case.call(*args)

    args = tuple(case.args(torch.float32))
    program = torch.export.export(Module(), args)
    assert any(case.name in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*args), case.call(*args))


@pytest.mark.parametrize(("case", "backend"), RUNS, ids=str)
def test_same_bits_in_every_run_and_with_any_number_of_threads(case: Case, backend: str) -> None:
    args, threads = case.args(torch.float32), torch.get_num_threads()
    with mcibi_fast.backend(backend):
        results = []
        for count in (1, 1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(case.call(*args))
    torch.set_num_threads(threads)
    # The product of PyTorch's that aggregation may take depends on the threads, as it says.
    by_threads = (case.name, backend) == ("gaussian_aggregate", "pytorch")
    groups = [results[:2], results[2:4]] if by_threads else [results]
    for first, *others in groups:
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_autocast(case: Case) -> None:
    args = case.args(torch.float32)
    with torch.autocast(args[0].device.type, torch.bfloat16):
        result = case.call(*args)
        compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager", dynamic=False)
        # The compiled graph may run another kernel: each rounds results of the size of the largest.
        rounding = torch.finfo(result.dtype if result.is_floating_point() else torch.float32).eps
        atol = rounding * float(result.abs().max())
        torch.testing.assert_close(compiled(*args), result, rtol=rounding, atol=atol)
    products = ("gaussian_aggregate", "confidence_attention", "class_rank_attention")
    assert result.dtype == (torch.bfloat16 if case.name in products else case.call(*args).dtype)
    torch.testing.assert_close(result.float(), case.call(*args).float(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_global_random_state_is_left_alone(case: Case) -> None:
    before = torch.get_rng_state()
    case.call(*case.args(torch.float32))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_explain_names_the_backend_and_the_reasons(case: Case) -> None:
    text = mcibi_fast.explain(case.op, *case.inputs, **case.options)
    first, *rest = text.splitlines()
    assert first == f"{case.name}: {case.chosen()}"
    assert len(rest) == len(mcibi_fast.ops.dispatch.BACKENDS)
    assert all("no: " in line or "run" in line for line in rest)
    with mcibi_fast.backend("reference"):
        forced = mcibi_fast.explain(case.name, *case.inputs, **case.options)
    assert forced.startswith(f"{case.name}: reference")
    assert "(forced)" in forced
