"""Compiles kernels for GPUs that are not there, and holds them to committed budgets.

The public functions run on CPU tensors with Triton's launch stopped after compilation, so what is
compiled is what a GPU would be given: arguments specialised by Triton, tiles chosen for the
device. ``budgets.json`` has registers a thread, bytes of stack (spilled registers) and shared
memory a block for each version of Triton, kernel module, architecture and size. To write those of
the installed version, without which the tests fail:

    python -m tests.ops.triton.compiled
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

BUDGETS = Path(__file__).with_name("budgets.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_KIB = {80: 163, 86: 99, 90: 227}  # a block's, by architecture
MANY = 10**6  # multiprocessors that no grid fills: the smallest tiles

Usage = dict[str, dict[str, int]]


class Case(NamedTuple):
    """One call. Its layout: rows are contiguous (B, N, D), or columns are (maps B, D, h, w)."""

    architecture: int
    dtype: torch.dtype
    channels: int
    layout: str = "columns"
    processors: int = 1
    rows: int = 256

    @property
    def split(self) -> bool:
        """Whether it is the forward pass of so many rows that its keys are split."""
        return self.rows > 256

    def __str__(self) -> str:
        tiles = "small" if self.processors == MANY else "large"
        if self.split:
            tiles = f"split {self.rows}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"sm_{self.architecture} {dtype} {self.channels} {self.layout} {tiles}"

    def tensor(self) -> torch.Tensor:
        tensor = torch.zeros(1, self.channels, self.rows, dtype=self.dtype).transpose(1, 2)
        return tensor.contiguous() if self.layout == "rows" else tensor


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
def compiling_for(case: Case, kernels: ModuleType) -> Iterator[list[Any]]:
    """Launches compile for the case's device and go no further; yields the compiled kernels.

    ``kernels`` is the module whose tiles are to be those of the device.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    limits = SHARED_KIB[case.architecture] * 1024, case.processors
    triton.runtime.driver.set_active(_Driver(case.architecture))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(kernels, "limits", lambda device: limits),
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


def instructions(kernel: Any) -> list[str]:
    """The names of the kernel's matrix instructions and of those that order them.

    Those of a whole group of warps, WGMMA, have their size in the name: HGMMA.64x128x16.F32.BF16.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"\b(HGMMA[\w.]+|HMMA|WARPGROUP\.\w+)", text)


def columns_of_products(kernel: Any) -> int:
    """Columns that the kernel's WGMMAs multiply 16 channels by, together."""
    sizes = (re.match(r"HGMMA\.64x(\d+)x16", name) for name in instructions(kernel))
    return sum(int(size[1]) for size in sizes if size)


def hold_to_budget(op: str, case: Case, measured: Usage) -> None:
    """Fails where a kernel does not fit the device, or uses more than the committed figures."""
    limit = SHARED_KIB[case.architecture] * 1024
    too_large = {name: use for name, use in measured.items() if use["shared"] > limit}
    assert not too_large, f"does not fit a block's {limit} bytes of shared memory"
    version = triton.__version__
    by_op = json.loads(BUDGETS.read_text()).get(version)
    write = "python -m tests.ops.triton.compiled"
    assert by_op is not None, f"no budgets for Triton {version}: `{write}` writes them"
    budgets = by_op[op][str(case)]
    over = [
        f"{name}: {use[figure]} {figure}, budget {budgets[name][figure]}"
        for name, use in measured.items()
        for figure in use
        if use[figure] > budgets[name][figure]
    ]
    assert not over, "; ".join(over)


def main() -> None:
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    by_op = budgets[triton.__version__] = {}
    for file in sorted(Path(__file__).parent.glob("test_*_compiled.py")):
        test = importlib.import_module(f"tests.ops.triton.{file.stem}")
        by_op[test.OP] = {str(case): test.measure(case) for case in test.CASES}
    text = json.dumps(budgets, indent=1, sort_keys=True)
    BUDGETS.write_text(re.sub(r"\{\s+(\"registers[^}]*?)\s+\}", _one_line, text) + "\n")


def _one_line(match: re.Match[str]) -> str:
    return "{" + " ".join(match[1].split()) + "}"


if __name__ == "__main__":
    main()
