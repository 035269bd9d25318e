"""What a compiler, a meta tensor or a second thread makes of an op."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mcibi_fast
from mcibi_fast import ops
from mcibi_fast.ops.dispatch import Op, _ops
from tests.ops.table import SMALL, Case

G = torch.Generator().manual_seed(0)
MEMORY = torch.rand(4, 2, generator=G)
FEATURES = torch.randn(2, 4, 3, 3, generator=G)
LABELS = torch.zeros(2, 6, 6, dtype=torch.int64)
ROWS = torch.randn(2, 5, 8, generator=G)

NUMBERS: dict[str, Callable[[float], Tensor]] = {
    "momentum": lambda x: ops.memory_update(MEMORY, FEATURES, LABELS, momentum=x),
    "scale": lambda x: ops.confidence_attention(ROWS, ROWS, ROWS, scale=x),
    "scale of classes": lambda x: ops.class_rank_attention(ROWS, ROWS, scale=x),
    "label_smoothing": lambda x: ops.upsample_cross_entropy(FEATURES, LABELS, label_smoothing=x),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_compiled_op_takes_other_numbers(name: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    call = NUMBERS[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for number in (0.1, 0.3, 0.7):
        torch.testing.assert_close(compiled(number), call(number))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", [c for c in SMALL if c.differentiable], ids=str)
def test_meta_tensors_have_gradients_too(case: Case, backend: str) -> None:
    case = case.on("meta")
    args = case.args(torch.float32)
    leaves = [args[i].requires_grad_() for i in case.differentiable]
    with mcibi_fast.backend(backend):
        result = case.call(*args)
        grads = torch.autograd.grad(result.sum(), leaves)
    assert result.is_meta and result.requires_grad
    assert [g.shape for g in grads] == [t.shape for t in leaves]


def turned(value: Any) -> Any:
    """The same values, the last two dimensions in the other order in memory."""
    return value.mT.contiguous().mT if isinstance(value, Tensor) and value.dim() > 1 else value


def layouts(op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    """The results, after the strides were compared with those the fake kernel promises."""
    results = op(*args)
    results = [results] if isinstance(results, Tensor) else list(results)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    promised = [fake] if isinstance(fake, Tensor) else list(fake)
    for result, promise in zip(results, promised, strict=True):
        assert (result.shape, result.dtype) == (promise.shape, promise.dtype)
        assert result.stride() == promise.stride(), op.name
    return results


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "turned"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.thinned(together=2)
def test_results_have_the_layout_that_a_compiler_was_promised(
    case: Case, backend: str, layout: str
) -> None:
    """A compiled graph reads the results by the strides that the fake kernel promises."""
    args = case.args(torch.float32, "contiguous" if layout == "turned" else layout)
    args = [turned(a) for a in args] if layout == "turned" else args
    op = _ops[case.name]
    with mcibi_fast.backend(backend):
        given = op.prepare(*args, **case.options)
        first, *rest = layouts(op, given)
        if case.name == "gaussian_aggregate":
            layouts(_ops["gaussian_table"], given[1:4])
        backward = _ops.get(f"{case.name}_backward")
        if backward is None or case.options.get("hard"):
            return
        for grad in (torch.ones_like(first), turned(torch.ones_like(first))):
            layouts(
                backward,
                {
                    "class_feature_sums": (
                        grad, given[1], *args[0].shape[2:], *given[3:], args[0].dtype
                    ),
                    "gaussian_aggregate": (grad, given[0], *rest, given[1], given[3]),
                    "confidence_attention": (grad, *given[:3], first, *rest, *given[3:]),
                    "class_rank_attention": (grad, *given[:2], first, *rest, given[2]),
                    "upsample_cross_entropy": (grad, *given[:2], *rest, *given[2:]),
                }[case.name],
            )  # fmt: skip


def test_blocks_of_two_threads_leave_nothing_forced() -> None:
    """However the threads overlap, each keeps the backend that it chose."""

    def chosen() -> str:
        return mcibi_fast.explain("upsample_argmax", FEATURES, (6, 6)).splitlines()[0]

    usual, inside, left = chosen(), threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with mcibi_fast.backend("reference"):
            inside.set()
            assert left.wait(10)
            seen.append(chosen())
        seen.append(chosen())

    thread = threading.Thread(target=other)
    with mcibi_fast.backend("auto"):
        thread.start()
        assert inside.wait(10)
        assert chosen() == usual
    left.set()
    thread.join()
    assert seen == ["upsample_argmax: reference", usual]
    assert chosen() == usual


def test_autograds_threads_have_the_backend_that_is_forced() -> None:
    seen = []
    with mcibi_fast.backend("reference"):
        thread = threading.Thread(
            target=lambda: seen.append(mcibi_fast.explain("upsample_argmax", FEATURES, (6, 6)))
        )
        thread.start()
        thread.join()
    assert seen[0].startswith("upsample_argmax: reference")
