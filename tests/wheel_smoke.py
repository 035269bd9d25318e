"""Runs a small row of every op of the installed package, on each backend that works here.

``python tests/wheel_smoke.py`` in an environment with only the wheel, torch and numpy. It prints
one line, and fails if the checkout's package is imported instead, or if the CPU part is not in use.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

import mcibi_fast
from mcibi_fast import ops

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    assert mcibi_fast.__file__ is not None
    assert not Path(mcibi_fast.__file__).is_relative_to(ROOT / "mcibi_fast"), mcibi_fast.__file__
    assert mcibi_fast.build_info()["backends"]["cpu"] is True, mcibi_fast.build_info()
    sys.path.append(str(ROOT))
    from tests.ops.table import SMALL

    count = 0
    for case in SMALL:
        with mcibi_fast.backend("reference"):
            expected = case.call(*case.args())
        for backend in case.backends():
            args = case.args()
            leaves = [args[i].requires_grad_() for i in case.differentiable]
            with mcibi_fast.backend(backend):
                result = case.call(*args)
            near = case.tolerance
            text = f"{case}: {backend}"
            torch.testing.assert_close(result, expected, rtol=near, atol=near, msg=text)
            if leaves:
                grads = torch.autograd.grad(result.sum(), leaves)
                assert all(grad.isfinite().all() for grad in grads), (case, backend)
            count += backend == "cpu"
    compiled = {case.name for case in SMALL if "cpu" in case.backends()}
    assert len(compiled) >= 5, compiled
    assert {case.name for case in SMALL} <= set(ops.__all__)
    print(f"{count} rows on Python {platform.python_version()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
