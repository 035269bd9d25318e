"""What a compiler, a meta tensor or a second thread makes of an op."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mcibi_fast
from mcibi_fast import ops
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


def test_blocks_of_two_threads_leave_nothing_forced() -> None:
    """However they overlap; each thread has what it asked for."""

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
