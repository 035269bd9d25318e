"""For the workers, whose bindings take CPU tensors: Python reads what a CUDA binding counted."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mcibi_fast.ops.compiled import cuda_kernel
from mcibi_fast.ops.labels import check_labels


def assert_counted_for_python(op: str, args: tuple[Any, ...], count: int, first: int) -> None:
    """The op as the package calls it, and the error that ``check_labels`` then raises once."""
    cuda_kernel(op).run(*args)
    message = f"labels: {op} on cpu met {count} labels outside [0, num_classes)"
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}.* the first is {first}$"):
        check_labels()
    check_labels()
