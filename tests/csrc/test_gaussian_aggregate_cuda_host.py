"""The CUDA kernels of the aggregation, run by the host executor, against PyTorch in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from mcibi_fast.ops.gaussian_aggregate import reference
from tests.csrc import host_kernels
from tests.csrc.gaussian_aggregate_host import FLOATS, GaussianAggregateHost

LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = {  # B, K, h, w, Z
    "vectors": (1, 20, 8, 8, 64),
    "pairs of classes": (1, 22, 5, 8, 40),
    "odd": (2, 19, 5, 7, 13),
    "one of all": (1, 1, 1, 1, 1),
    "one pixel": (3, 5, 1, 1, 33),
    "one class": (1, 1, 3, 11, 9),
    "one column": (1, 6, 37, 1, 8),
    "more than a step": (1, 40, 3, 24, 72),
    "more than a slice": (1, 3, 13, 11, 70),
}
MANY_CLASSES = [65, 161, 200]
# Attributes of the executor's device: processors, bytes of shared memory per block.
DEVICES = {"sm_90": (132, 227), "one processor": (1, 227), "sm_86": (84, 99), "small": (1, 56)}


@pytest.fixture(scope="module")
def ops(compile_cache: Path) -> GaussianAggregateHost:
    return GaussianAggregateHost(host_kernels.load(compile_cache, "gaussian_aggregate"))


@pytest.fixture(scope="module")
def race_checked(compile_cache: Path) -> GaussianAggregateHost:
    return GaussianAggregateHost(host_kernels.load(compile_cache, "gaussian_aggregate", races=True))


@pytest.fixture
def set_device(ops: GaussianAggregateHost) -> Iterator[Callable[[int, int], None]]:
    yield ops.set_device
    ops.set_device(*DEVICES["sm_90"])


class Problem:
    """Inputs of one call, and what PyTorch makes of them in float64 and in their dtype."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        generator: Generator,
        *,
        layout: torch.memory_format = torch.contiguous_format,
        noise: Tensor | None = None,
    ) -> None:
        B, K, h, w, Z = shape
        self.dtype, self.channels = dtype, Z
        self.memory = torch.rand(K, 2, generator=generator) + 0.1
        self.noise = torch.randn(K, Z, generator=generator) if noise is None else noise
        self.logits, self.grad = (
            (scale * torch.randn(B, C, h, w, generator=generator))
            .to(dtype)
            .contiguous(memory_format=layout)
            for C, scale in ((K, 3.0), (Z, 1.0))
        )

    def by_pytorch(self, dtype: torch.dtype, hard: bool = False) -> tuple[Tensor, Tensor]:
        """The result and the gradient of the logits (hard: none) in eager PyTorch."""
        logits = self.logits.to(dtype).detach().requires_grad_()
        C_dl = reference.gaussian_table(self.memory, self.channels, self.noise).to(dtype)
        W = torch.softmax(logits, dim=1)
        if hard:
            W = torch.zeros_like(W).scatter(1, logits.argmax(1, keepdim=True), 1.0)
        out = torch.einsum("bkhw,kz->bzhw", W, C_dl)
        if hard:
            return out, torch.zeros_like(logits)
        return out.detach(), torch.autograd.grad(out, logits, self.grad.to(dtype))[0]

    def run(self, ops: GaussianAggregateHost, hard: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The result, the log-sum-exp and the gradient from the kernels."""
        table = self.memory, self.noise
        out, lse = ops.gaussian_aggregate(self.logits, table[0], self.channels, table[1], hard)
        return out, lse, ops.gaussian_aggregate_backward(self.grad, self.logits, lse, *table)

    def assert_as_good_as_pytorch(self, ops: GaussianAggregateHost) -> None:
        out, lse, grad_logits = self.run(ops)
        for found, exact, eager in zip(
            (out, grad_logits),
            self.by_pytorch(torch.float64),
            self.by_pytorch(self.dtype),
            strict=True,
        ):
            _assert_as_good(found, exact, eager)
        _assert_close(lse, torch.logsumexp(self.logits.double(), 1).flatten(1), 4e-7)


def _assert_as_good(found: Tensor, exact: Tensor, eager: Tensor) -> None:
    """At most twice the error of PyTorch in the same precision (and a few roundings)."""
    assert torch.equal(found.isfinite(), exact.isfinite())
    rounding = 4 * torch.finfo(found.dtype).eps
    if found.dtype == torch.float64:  # PyTorch is the exact result then
        rounding *= 100
    finite = exact.isfinite()
    exact, found, eager = exact[finite], found[finite].double(), eager[finite].double()
    if exact.numel() == 0:
        return
    allowed = 2 * (eager - exact).abs().max() + rounding * exact.abs().max()
    assert (found - exact).abs().max() <= allowed


def _assert_close(found: Tensor, exact: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), exact.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.thinned(together=2)
def test_sizes(
    ops: GaussianAggregateHost,
    generator: Generator,
    name: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    Problem(SHAPES[name], dtype, generator, layout=layout).assert_as_good_as_pytorch(ops)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", MANY_CLASSES)
@pytest.mark.thinned
def test_many_classes(
    ops: GaussianAggregateHost,
    generator: Generator,
    classes: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    """More than registers, or one sweep of the backward, hold."""
    shape = 1, classes, 4, 9, 40
    Problem(shape, dtype, generator, layout=layout).assert_as_good_as_pytorch(ops)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.thinned
def test_plans(
    ops: GaussianAggregateHost,
    set_device: Callable[[int, int], None],
    generator: Generator,
    device: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    """Few and many blocks; tables that stay in shared memory, and tables that do not fit."""
    set_device(*DEVICES[device])
    for shape in [(1, 150, 5, 9, 200), (1, 20, 17, 17, 400)]:
        Problem(shape, dtype, generator, layout=layout).assert_as_good_as_pytorch(ops)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_and_offsets(
    ops: GaussianAggregateHost, generator: Generator, dtype: torch.dtype
) -> None:
    problem = Problem((2, 8, 4, 6, 24), dtype, generator)

    def views(t: Tensor) -> list[Tensor]:
        B, C, h, w = t.shape
        return [
            t.transpose(2, 3).contiguous().transpose(2, 3),
            t.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
            torch.empty(B, C + 3, h + 1, w + 2, dtype=dtype)[:, 2 : C + 2, 1:, :w].copy_(t),
            torch.empty(B, h, w, C + 2, dtype=dtype)[..., :C].permute(0, 3, 1, 2).copy_(t),
            torch.empty(B, h, w, C + 5, dtype=dtype)[..., 5:].permute(0, 3, 1, 2).copy_(t),
            torch.empty(B, h, 2 * w, C, dtype=dtype)[:, :, ::2].permute(0, 3, 1, 2).copy_(t),
            torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t),
            torch.empty(t.numel() + 2, dtype=dtype)[2:].view(t.shape).copy_(t),
        ]

    for layout in LAYOUTS:
        for logits, grad in zip(views(problem.logits), views(problem.grad), strict=True):
            problem.logits, problem.grad = logits, grad.contiguous(memory_format=layout)
            problem.assert_as_good_as_pytorch(ops)
            problem.logits, problem.grad = logits.contiguous(memory_format=layout), grad
            problem.assert_as_good_as_pytorch(ops)
    problem.grad = problem.grad[:1, :1, :1, :1].expand_as(problem.grad)  # as from .sum()
    problem.assert_as_good_as_pytorch(ops)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_32_bits(
    ops: GaussianAggregateHost, generator: Generator, dtype: torch.dtype
) -> None:
    problem = Problem((2, 4, 4, 4, 8), dtype, generator)
    near = problem.run(ops)
    far = 2**31 + 64  # elements from the first image to the second; untouched pages between
    try:
        storages = [torch.empty(far + 128, dtype=dtype) for _ in range(2)]
    except RuntimeError:
        pytest.skip("needs 17 GB of address space")
    for name, storage in zip(("logits", "grad"), storages, strict=True):
        tensor = getattr(problem, name)
        view = storage.as_strided(tensor.shape, (far, 16, 4, 1)).copy_(tensor)
        setattr(problem, name, view)
    assert all(torch.equal(a, b) for a, b in zip(problem.run(ops), near, strict=True))


@pytest.mark.parametrize("noise_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.float64])
def test_table(
    ops: GaussianAggregateHost,
    generator: Generator,
    memory_dtype: torch.dtype,
    noise_dtype: torch.dtype,
) -> None:
    memory = torch.randn(2, 19, generator=generator, dtype=memory_dtype).T
    noise = torch.randn(26, 38, generator=generator, dtype=noise_dtype)[::2, ::2].T
    expected = reference.gaussian_table(memory, 13, noise)
    assert torch.equal(ops.gaussian_table(memory, 13, noise), expected)


def test_table_golden(
    ops: GaussianAggregateHost, golden: Callable[[str], dict[str, np.ndarray]]
) -> None:
    data = {name: torch.from_numpy(array) for name, array in golden("gaussian_table.npz").items()}
    found = ops.gaussian_table(data["memory"].float(), 16, data["eps_K5_Z16"].float())
    assert torch.equal(found, data["table_Z16"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_philox(
    ops: GaussianAggregateHost,
    generator: Generator,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    state = torch.tensor([-(2**62) + 12345, 0, 2**32 + 7])[::2]  # strided; the step's low bits
    problem = Problem((1, 19, 5, 8, 41), dtype, generator, layout=layout, noise=state)
    unit = torch.tensor([[0.0, 1.0]]).expand(19, 2)
    noise = reference.philox_normal(19, 41, state)
    _assert_close(ops.gaussian_table(unit, 41, state), noise, 2e-6)
    if dtype != torch.float64:
        problem.assert_as_good_as_pytorch(ops)
    by_state = problem.run(ops)
    problem.noise = ops.gaussian_table(unit, 41, state)
    assert all(torch.equal(a, b) for a, b in zip(by_state, problem.run(ops), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", [19, 210])
@pytest.mark.thinned
def test_hard(
    ops: GaussianAggregateHost,
    generator: Generator,
    classes: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    problem = Problem((2, classes, 5, 7, 40), dtype, generator, layout=layout)
    problem.logits.mul_(0.4).round_()  # ties: the first class wins
    problem.logits[0, :, 0, 0] = -torch.inf
    out, statistic, _ = problem.run(ops, hard=True)
    expected, _ = problem.by_pytorch(dtype, hard=True)
    assert torch.equal(out, expected)
    assert torch.equal(statistic, problem.logits.to(statistic.dtype).amax(1).flatten(1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("classes", [7, *MANY_CLASSES])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.thinned
def test_hard_takes_nan_as_the_largest(
    ops: GaussianAggregateHost,
    generator: Generator,
    dtype: torch.dtype,
    classes: int,
    layout: torch.memory_format,
) -> None:
    """The first one, as in torch.argmax: also after an infinity, and before one."""
    problem = Problem((1, classes, 3, 7, 6), dtype, generator, layout=layout)
    for x in range(7):
        nan, infinite = torch.randperm(classes, generator=generator)[:2]
        problem.logits[0, infinite, 1, x] = torch.inf
        problem.logits[0, nan, 1:, x] = torch.nan
        problem.logits[0, infinite, 2, x] = torch.nan
    out, statistic, _ = problem.run(ops, hard=True)
    table = reference.gaussian_table(problem.memory, 6, problem.noise).to(dtype)
    labels = problem.logits.argmax(1)
    assert torch.equal(out, table[labels].movedim(-1, 1))
    assert torch.equal(statistic.isnan().view(1, 3, 7), problem.logits.isnan().any(1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", [19, 200])
@pytest.mark.thinned
def test_extreme_logits(
    ops: GaussianAggregateHost,
    generator: Generator,
    classes: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    problem = Problem((1, classes, 6, 8, 40), dtype, generator, layout=layout)
    problem.logits[:, :, 1] *= 1000
    problem.logits[:, :, 2] += 3000
    problem.logits[:, :, 3] -= 3000
    problem.logits[:, 1:, 4] = -torch.inf
    problem.logits[:, : classes - 2, 5, 1:] = -torch.inf
    problem.assert_as_good_as_pytorch(ops)
    problem.logits[0, :, 0, 0] = -torch.inf  # no class at all: NaN there, and only there
    problem.assert_as_good_as_pytorch(ops)


def _all_kernels(ops: GaussianAggregateHost) -> Callable[[], list[Tensor]]:
    """Inputs that take every path, with several tiles for a block, where the table fits in shared
    memory and where it does not."""
    generator = Generator().manual_seed(2)
    problems = [
        (kilobytes, Problem(shape, dtype, generator, layout=layout))
        for kilobytes, dtype, shape in [
            (99, torch.bfloat16, (1, 20, 13, 5, 40)),  # odd rows of pixels
            (99, torch.float16, (1, 18, 4, 9, 40)),
            (30, torch.bfloat16, (1, 400, 5, 8, 70)),
            (99, torch.float32, (1, 40, 2, 65, 40)),
            (48, torch.float32, (1, 70, 2, 65, 130)),
            (56, torch.float64, (1, 70, 2, 65, 70)),
        ]
        for layout in LAYOUTS
    ]

    def run() -> list[Tensor]:
        results = []
        for kilobytes, problem in problems:
            ops.set_device(1, kilobytes)
            results += problem.run(ops)
        ops.set_device(*DEVICES["sm_90"])
        return results

    return run


def test_same_bits_in_any_order_of_threads(ops: GaussianAggregateHost) -> None:
    run = _all_kernels(ops)
    expected = run()
    for seed in range(1, 5):
        ops.kernels.set_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    ops.kernels.set_seed(0)


@pytest.mark.slow
def test_every_barrier_is_needed(ops: GaussianAggregateHost) -> None:
    run = _all_kernels(ops)
    host_kernels.assert_every_site_is_needed("gaussian_aggregate", ops.kernels, run, range(8))


@pytest.mark.slow
def test_no_races(race_checked: GaussianAggregateHost) -> None:
    """Every memory access of every kernel; and without any one barrier there is a race."""
    run = _all_kernels(race_checked)
    host_kernels.assert_every_site_is_needed(
        "gaussian_aggregate", race_checked.kernels, run, range(1)
    )


@pytest.mark.slow
def test_binding(compile_cache: Path) -> None:
    """Registration, checks and allocation, in a process of its own: it registers the operators."""
    library = host_kernels.build_binding(compile_cache, "gaussian_aggregate")
    worker = Path(__file__).with_name("gaussian_aggregate_binding_worker.py")
    command = [sys.executable, str(worker), str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
