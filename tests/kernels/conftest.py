"""What the tests of the kernels share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


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
