"""What the tests of the Triton kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.ops.triton.interpreter import Interpreter, interpreting, why_not


@pytest.fixture(scope="session", autouse=True)
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    """Where tests that are marked ``interpreted`` are called; started by the first of them."""
    process = Interpreter(tmp_path_factory.mktemp("interpreter") / "log.txt")
    yield process
    process.close()


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Calls a test that is marked ``interpreted`` in the interpreter's process."""
    if "interpreted" not in pyfuncitem.keywords or interpreting():
        return None
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    outcome, why = pyfuncitem.funcargs["interpreter"].run(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(why)
    if outcome == "failed":
        pytest.fail(why, pytrace=False)
    return True


@pytest.fixture
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter sum a product of matrices as a GPU does: a chain of fused additions.

    Its own is NumPy's, whose order depends on the shapes, so that S and S^T have different bits.
    """
    from triton.runtime import interpreter

    def create_dot(_self: Any, a: Any, b: Any, sum_: Any, *_options: Any) -> Any:
        columns, rows = a.data.T.astype(np.float64), b.data.astype(np.float64)
        products = sum_.data
        for column, row in zip(columns, rows, strict=True):
            products = (products + column[:, None] * row).astype(np.float32)
        return interpreter.TensorHandle(products, sum_.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
