"""Compiles the kernels for GPUs that are not there, and holds them to committed budgets.

The public functions run on CPU tensors with Triton's launch stopped after compilation, so what is
compiled is what a GPU would be given: arguments specialised by Triton, tiles chosen for the
device. ``budgets.json`` has registers a thread, bytes of stack (spilled registers) and shared
memory a block for each version of Triton and each architecture. A version without a row reports
its figures and passes. To write the row of the installed version:

    python -m tests.kernels.test_confidence_attention_compiled
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from mcibi_fast.kernels import confidence_attention  # noqa: E402

BUDGETS = Path(__file__).with_name("budgets.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_KIB = {80: 163, 86: 99, 90: 227}  # a block's, by architecture
MANY = 10**6  # multiprocessors that no grid fills: the smallest tiles


class Case(NamedTuple):
    """One call. Its layout: rows are contiguous (B, N, D), or columns are (maps B, D, h, w)."""

    architecture: int
    dtype: torch.dtype
    channels: int
    layout: str = "columns"
    processors: int = 1

    def __str__(self) -> str:
        tiles = "small" if self.processors == MANY else "large"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"sm_{self.architecture} {dtype} {self.channels} {self.layout} {tiles}"


CASES = [
    *(Case(a, torch.bfloat16, d) for a in (80, 86, 90) for d in (256, 512)),
    Case(90, torch.bfloat16, 256, layout="rows"),
    Case(90, torch.bfloat16, 256, processors=MANY),
    Case(80, torch.float32, 512),
    Case(90, torch.float32, 256),
]


class _Driver:
    """As much of a driver as compiling for an architecture asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> str:
        return f"sm_{self.architecture}"  # the key of Triton's cache in memory

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(case: Case) -> Iterator[list[Any]]:
    """Launches compile for the case's device and go no further; yields the compiled kernels."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    limits = SHARED_KIB[case.architecture] * 1024, case.processors
    triton.runtime.driver.set_active(_Driver(case.architecture))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(confidence_attention, "_limits", lambda device: limits),
        ):
            yield compiled
    finally:
        triton.runtime.driver._active = None


def usage(kernel: Any) -> dict[str, int]:
    """Registers a thread, bytes of stack a thread and bytes of shared memory a block."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = dict(re.findall(r"(REG|STACK):(\d+)", text.stdout + text.stderr))
    return {
        "registers": int(figures["REG"]),
        "stack": int(figures["STACK"]),
        "shared": kernel.metadata.shared,
    }


def compile_all(case: Case, *tensors: torch.Tensor) -> dict[str, Any]:
    """The kernels of a forward and a backward pass on query, key, value and dO."""
    query, key, value, grad = tensors
    with compiling_for(case) as compiled:
        out, lse = confidence_attention.confidence_attention_forward(query, key, value, 0.1)
        confidence_attention.confidence_attention_backward(grad, query, key, value, out, lse, 0.1)
    names = ("forward", "delta", "value gradient", "key gradient", "query gradient")
    return dict(zip(names, compiled, strict=True))


def measure(case: Case) -> dict[str, dict[str, int]]:
    """What each kernel uses on square inputs of the case's kind."""
    tensor = torch.zeros(1, case.channels, 256, dtype=case.dtype).transpose(1, 2)
    if case.layout == "rows":
        tensor = tensor.contiguous()
    return {name: usage(kernel) for name, kernel in compile_all(case, *[tensor] * 4).items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_budget(case: Case) -> None:
    measured = measure(case)
    limit = SHARED_KIB[case.architecture] * 1024
    too_large = {name: use for name, use in measured.items() if use["shared"] > limit}
    assert not too_large, f"does not fit a block's {limit} bytes of shared memory"
    budgets = json.loads(BUDGETS.read_text()).get(triton.__version__)
    if budgets is None:
        warnings.warn(
            f"no budgets for Triton {triton.__version__}: {case}: {measured}", stacklevel=1
        )
        return
    over = [
        f"{name}: {use[figure]} {figure}, budget {budgets[str(case)][name][figure]}"
        for name, use in measured.items()
        for figure in use
        if use[figure] > budgets[str(case)][name][figure]
    ]
    assert not over, "; ".join(over)


def test_unusual_sizes_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query (to Triton a compile-time 1), masked D and Dv that differ, 64-bit offsets."""
    monkeypatch.setattr(confidence_attention, "_wide", lambda *tensors: True)
    case = Case(90, torch.float16, 48)
    sizes = ((2, 1, 19), (2, 67, 19), (2, 67, 48), (2, 1, 48))
    assert len(compile_all(case, *(torch.zeros(s, dtype=case.dtype) for s in sizes))) == 5


def main() -> None:
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    budgets[triton.__version__] = {str(case): measure(case) for case in CASES}
    text = json.dumps(budgets, indent=1, sort_keys=True)
    BUDGETS.write_text(re.sub(r"\{\s+(\"registers[^}]*?)\s+\}", _one_line, text) + "\n")


def _one_line(match: re.Match[str]) -> str:
    return "{" + " ".join(match[1].split()) + "}"


if __name__ == "__main__":
    main()
