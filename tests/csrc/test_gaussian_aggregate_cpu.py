"""The C++ kernels of the aggregation, called directly, against a plain float64 reference."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mcibi_fast import _build

if _build.load_extensions()["cpu"] is not None:
    pytest.skip(f"needs _cpu: {_build.load_extensions()['cpu']}", allow_module_level=True)

kernels = torch.ops.mcibi_fast_cpu
ROOT = Path(__file__).resolve().parents[2]

# (B, K, h, w, Z): single pixels, classes and channels, few pixels, tails of every block, several
# tiles, and several runs of tiles.
SIZES = [
    (1, 1, 1, 1, 1),
    (1, 7, 1, 1, 33),
    (2, 19, 13, 17, 37),
    (3, 2, 8, 8, 512),
    (1, 150, 5, 13, 129),
    (2, 1, 3, 5, 14),
    (1, 31, 1, 127, 29),
    (2, 19, 1, 4, 37),  # 8 pixels: the most that use the table unpacked
    (1, 17, 2, 3, 16),
    (3, 150, 1, 3, 5),
    (2, 24, 19, 23, 30),  # the most classes whose gradient is read where it is
    (1, 25, 19, 23, 30),
    (1, 3, 37, 31, 67),
]
LOW = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "strided", "transposed", "expanded"]


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of t (for "expanded": of one of its images) in a memory layout."""
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "strided":  # every second element, NaN between
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return t[:1].expand_as(t)
    return t.contiguous()


def make(
    size: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, memory, noise, and a gradient of the output; all exact in every dtype."""
    B, K, h, w, Z = size
    g = torch.Generator().manual_seed(sum(size))
    shapes = [(B, K, h, w), (K, 2), (K, Z), (B, Z, h, w)]
    values = [torch.randn(s, generator=g).bfloat16().double() for s in shapes]
    logits, memory, noise, grad = values
    return (3 * logits).to(dtype), memory, noise, grad.to(dtype)


def reference(logits: Tensor, memory: Tensor, noise: Tensor) -> Tensor:
    table = memory[:, :1] + memory[:, 1:] * noise
    return torch.einsum("bkhw,kz->bzhw", torch.softmax(logits, 1), table.to(logits.dtype))


def eager(logits: Tensor, memory: Tensor, noise: Tensor) -> Tensor:
    """What PyTorch's own kernels give in the dtype of the logits."""
    table = (memory[:, :1] + memory[:, 1:] * noise).to(logits.dtype)
    out = torch.matmul(table.T, torch.softmax(logits, 1).flatten(2))
    return out.unflatten(2, logits.shape[2:])


def gradient(function: object, logits: Tensor, grad: Tensor, *table: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf, *table), leaf, grad)[0]  # type: ignore[operator]


def worst(ours: Tensor, exact: Tensor) -> float:
    """Largest error over largest value."""
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300))


def assert_as_good_as(ours: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """At most twice PyTorch's error in the same dtype, or a rounding of the result."""
    assert ours.dtype == dtype
    if dtype == torch.float64:  # the yardstick is no better itself
        assert worst(ours, exact) < 1e-13
    else:
        assert worst(ours, exact) <= max(2 * worst(eager, exact), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_float64(size: tuple[int, ...], layout: str, poison: None) -> None:
    logits, memory, noise, grad = make(size)
    logits, grad = laid_out(logits, layout), laid_out(grad, layout)
    out, lse = kernels.gaussian_aggregate(logits, memory, size[-1], noise, False)
    assert worst(out, reference(logits, memory, noise)) < 1e-14
    assert (lse - torch.logsumexp(logits, 1).flatten(1)).abs().max() < 1e-13
    ours = kernels.gaussian_aggregate_backward(grad, logits, lse, memory, noise)
    exact = gradient(reference, logits, grad, memory, noise)
    assert (ours - exact).abs().max() <= 1e-13 * (1 + exact.abs().max())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.thinned(together=2)
def test_low_precision(
    size: tuple[int, ...], dtype: torch.dtype, layout: str, poison: None
) -> None:
    logits, memory, noise, grad = make(size, dtype)
    args = (memory, noise)
    logits, grad = laid_out(logits, layout), laid_out(grad, layout)
    out, lse = kernels.gaussian_aggregate(logits, memory, size[-1], noise, False)
    exact = reference(logits.double(), *args)
    assert_as_good_as(out, eager(logits, *args), exact, dtype)
    assert lse.dtype == torch.float32
    assert (lse - torch.logsumexp(logits.double(), 1).flatten(1)).abs().max() < 4e-6
    ours = kernels.gaussian_aggregate_backward(grad, logits, lse, memory, noise)
    exact = gradient(reference, logits.double(), grad.double(), *args)
    if size[1] > 1:  # of one class the gradient is 0, of which there is no share
        assert_as_good_as(ours, gradient(eager, logits, grad, *args), exact, dtype)
    else:
        assert not ours.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.thinned(together=2)
def test_hard_copies_the_first_argmax(
    size: tuple[int, ...], dtype: torch.dtype, layout: str, poison: None
) -> None:
    logits, memory, noise, _ = make(size, dtype)
    logits = laid_out((logits / 4).round(), layout)  # ties
    table = kernels.gaussian_table(memory.float(), size[-1], noise.float())
    out, lse = kernels.gaussian_aggregate(logits, memory.float(), size[-1], noise.float(), True)
    first = (logits == logits.amax(1, keepdim=True)).to(torch.uint8).argmax(1)
    assert torch.equal(out, table[first].movedim(3, 1).to(dtype))
    assert torch.equal(lse, logits.amax(1).flatten(1).to(lse.dtype))


def test_memory_format_follows_the_logits() -> None:
    logits, memory, noise, grad = make((2, 5, 3, 7, 6))
    last = torch.channels_last
    for given in (logits, logits.contiguous(memory_format=last), laid_out(logits, "strided")):
        expected = given.is_contiguous(memory_format=last)
        for hard in (False, True):
            out, lse = kernels.gaussian_aggregate(given, memory, 6, noise, hard)
            assert out.is_contiguous(memory_format=last) == expected
            assert out.is_contiguous() == (not expected)
        for g in (grad, grad.contiguous(memory_format=last), grad[:1].expand_as(grad)):
            lse = kernels.gaussian_aggregate(given, memory, 6, noise, False)[1]
            ours = kernels.gaussian_aggregate_backward(g, given, lse, memory, noise)
            assert ours.is_contiguous(memory_format=last) == expected
            assert worst(ours, gradient(reference, given, g, memory, noise)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_minus_infinity_and_large_logits(dtype: torch.dtype) -> None:
    size = (2, 19, 9, 11, 21)
    logits, memory, noise, grad = make(size, dtype)
    g = torch.Generator().manual_seed(1)
    away = torch.rand(logits.shape, generator=g) < 0.4
    away[:, 3] = False
    away[:, :, 0, 0] = True  # a certain class
    away[:, 3, 0, 0] = False
    for scores in (logits.masked_fill(away, -math.inf), 3e3 * logits, logits + 1e4):
        out, lse = kernels.gaussian_aggregate(scores, memory, size[-1], noise, False)
        args = (memory, noise)
        exact = reference(scores.double(), *args)
        assert_as_good_as(out, eager(scores, *args), exact, dtype)
        ours = kernels.gaussian_aggregate_backward(grad, scores, lse, memory, noise)
        assert ours.isfinite().all()
        exact = gradient(reference, scores.double(), grad.double(), *args)
        assert_as_good_as(ours, gradient(eager, scores, grad, *args), exact, dtype)


def test_not_a_number_stays_in_its_pixel() -> None:
    logits, memory, noise, _ = make((1, 6, 9, 9, 5), torch.float32)
    logits[0, 2, 4, 4] = float("nan")
    logits[0, :, 5, 5] = -math.inf
    out, lse = kernels.gaussian_aggregate(logits, memory, 5, noise, False)
    expected = torch.zeros(1, 5, 9, 9, dtype=torch.bool)
    expected[0, :, 4, 4] = expected[0, :, 5, 5] = True
    assert torch.equal(out.isnan(), expected)
    assert lse.view(9, 9)[5, 5] == -math.inf
    hard, _ = kernels.gaussian_aggregate(logits, memory, 5, noise, True)
    table = kernels.gaussian_table(memory, 5, noise)
    assert torch.equal(hard[0, :, 4, 4], table[2].float())  # as torch.argmax: NaN is largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_of_every_16_bit_float(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    memory, noise = torch.tensor([[0.0, 1.0]]), torch.zeros(1, 1)
    _, lse = kernels.gaussian_aggregate(values.view(1, 1, 1, -1), memory, 1, noise, True)
    torch.testing.assert_close(lse[0], values.float(), rtol=0, atol=0, equal_nan=True)
    # Rounding: the values, the midpoints of neighbours, and what lies just beside both.
    wide = values.float()[values.isfinite()].sort().values
    middle = (wide[1:].double() + wide[:-1].double()) / 2
    points = torch.cat([wide, middle.float(), torch.tensor([math.inf, -math.inf, math.nan, 1e38])])
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    points = torch.cat([points, torch.nextafter(points, up), torch.nextafter(points, down)])
    one = torch.zeros(1, 1, 1, 1, dtype=dtype)
    out, _ = kernels.gaussian_aggregate(one, memory, len(points), points.view(1, -1), True)
    torch.testing.assert_close(out.flatten(), points.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_same_bits_for_any_number_of_threads() -> None:
    logits, memory, noise, grad = make((2, 19, 31, 33, 70), torch.float32)
    state = torch.tensor([3, 4])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for n in (noise, state):
                out, lse = kernels.gaussian_aggregate(logits, memory, 70, n, False)
                back = kernels.gaussian_aggregate_backward(grad, logits, lse, memory, n)
                table = kernels.gaussian_table(memory, 70, n)
                results.append(torch.cat([t.flatten().double() for t in (out, lse, back, table)]))
    finally:
        torch.set_num_threads(before)
    for i, result in enumerate(results[2:]):
        assert torch.equal(result, results[i % 2])


# ---- the table ---------------------------------------------------------------


def test_table_is_rounded_twice() -> None:
    g = torch.Generator().manual_seed(2)
    memory, noise = torch.randn(9, 2, generator=g), torch.randn(9, 517, generator=g)
    table = kernels.gaussian_table(memory, 517, noise)
    product = memory[:, 1:] * noise
    assert torch.equal(table, memory[:, :1] + product)
    fused = (memory[:, :1].double() + memory[:, 1:].double() * noise.double()).float()
    assert not torch.equal(table, fused), "these inputs do not tell the two apart"


@pytest.mark.parametrize("channels", [8, 16, 24, 512])
def test_table_of_the_released_code(golden, channels: int) -> None:
    recorded = golden("gaussian_table.npz")
    memory = torch.from_numpy(recorded["memory"])
    if channels == 512:
        noise = torch.from_numpy(golden("eps_K182_Z512.npz")["eps"])[: len(memory)]
    elif channels == 16:
        noise = torch.from_numpy(recorded["eps_K5_Z16"])
    else:  # not a prefix of the others: drawn here as the released code draws it
        rows = [torch.Generator().manual_seed(k) for k in range(len(memory))]
        noise = torch.stack([torch.empty(channels).normal_(generator=g) for g in rows])
        mean, std = memory.float().split(1, 1)
        if not torch.equal(mean + std * noise, torch.from_numpy(recorded[f"table_Z{channels}"])):
            pytest.skip("needs the generator's AVX2 or AVX-512 path, which recorded the table")
    table = kernels.gaussian_table(memory, channels, noise)
    assert torch.equal(table, torch.from_numpy(recorded[f"table_Z{channels}"]))


def test_table_is_computed_in_the_dtype_of_the_noise() -> None:
    g = torch.Generator().manual_seed(3)
    memory = torch.randn(2, 5, generator=g, dtype=torch.float64).T  # any strides
    noise = torch.randn(40, 5, generator=g, dtype=torch.float64).T[:, ::2]
    for memory_dtype in (torch.float32, torch.float64):
        for dtype in (torch.float32, torch.float64):
            m, n = memory.to(memory_dtype), noise.to(dtype)
            table = kernels.gaussian_table(m, 20, n)
            assert table.dtype == dtype
            mean, std = m.to(dtype).split(1, 1)
            assert torch.equal(table, mean + std * n)


def philox_words(counter: list[int], seed: int) -> list[int]:
    """Philox4x32-10 in Python integers."""
    mask = 2**32 - 1
    (c0, c1, c2, c3), k0, k1 = counter, seed & mask, seed >> 32 & mask
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & mask, p0 >> 32 ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def philox_normals(seed: int, step: int, K: int, Z: int) -> Tensor:
    """eps (K, Z) by the formula, in float64."""
    quads = (Z + 3) // 4
    counters = [[z4, k, step & (2**32 - 1), 0] for k in range(K) for z4 in range(quads)]
    words = torch.tensor([philox_words(c, seed) for c in counters], dtype=torch.float64)
    u0, u1 = ((words + 0.5) / 2**32).view(K, 2 * quads, 2).unbind(2)
    r = torch.sqrt(-2 * torch.log(u0))
    pair = [r * torch.cos(2 * math.pi * u1), r * torch.sin(2 * math.pi * u1)]
    return torch.stack(pair, 2).flatten(1)[:, :Z]


@pytest.mark.parametrize(
    ("seed", "step"), [(0, 0), (1, 2), (-1, -1), (2**40 + 7, 2**31), (-(2**63), 2**33 + 5)]
)
def test_philox(seed: int, step: int) -> None:
    K, Z = 6, 301
    memory = torch.tensor([[0.0, 1.0]]).expand(K, 2)
    state = torch.tensor([[seed, 0], [step, 0]])[:, 0]  # any stride
    table = kernels.gaussian_table(memory, Z, state)
    assert table.dtype == torch.float32
    assert (table - philox_normals(seed, step, K, Z)).abs().max() <= 2e-6
    for z in (1, 2, 3, 5, 256):  # depends on nothing but (seed, step, k, z)
        assert torch.equal(kernels.gaussian_table(memory[:2], z, state), table[:2, :z])


@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_philox_aggregates_its_table(dtype: torch.dtype) -> None:
    logits, memory, _, grad = make((1, 19, 5, 7, 38), dtype)
    state = torch.tensor([5, 6])
    table = kernels.gaussian_table(memory, 38, state)
    zero = torch.stack([torch.zeros(19), torch.ones(19)], 1)
    for hard in (False, True):
        drawn = kernels.gaussian_aggregate(logits, memory, 38, state, hard)
        given = kernels.gaussian_aggregate(logits, zero, 38, table, hard)
        assert torch.equal(drawn[0], given[0]) and torch.equal(drawn[1], given[1])
    _, lse = kernels.gaussian_aggregate(logits, memory, 38, state, False)
    drawn = kernels.gaussian_aggregate_backward(grad, logits, lse, memory, state)
    given = kernels.gaussian_aggregate_backward(grad, logits, lse, zero, table)
    assert torch.equal(drawn, given)


def test_philox_against_its_known_answers(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    command = [compiler, "-std=c++17", "-O2", f"-I{ROOT / 'csrc'}", "-o", str(tmp_path / "test")]
    subprocess.run([*command, str(ROOT / "csrc/testing/philox_test.cpp")], check=True)
    result = subprocess.run([str(tmp_path / "test")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# ---- errors, memory safety, the other instruction sets -----------------------


def test_errors_name_the_argument() -> None:
    logits, memory, noise, grad = make((1, 5, 2, 3, 4))
    lse = kernels.gaussian_aggregate(logits, memory, 4, noise, False)[1]
    backward = kernels.gaussian_aggregate_backward
    cases = [
        ("logits", lambda: kernels.gaussian_aggregate(logits[0], memory, 4, noise, False)),
        ("logits", lambda: kernels.gaussian_aggregate(logits.int(), memory, 4, noise, False)),
        ("classes", lambda: kernels.gaussian_aggregate(logits[:, :4], memory, 4, noise, False)),
        ("memory", lambda: kernels.gaussian_table(memory.T, 4, noise)),
        ("memory", lambda: kernels.gaussian_table(memory.half(), 4, noise)),
        ("channels", lambda: kernels.gaussian_table(memory, 0, noise[:, :0])),
        ("noise", lambda: kernels.gaussian_table(memory, 5, noise)),
        ("noise", lambda: kernels.gaussian_table(memory, 4, noise.half())),
        ("noise", lambda: kernels.gaussian_table(memory, 4, torch.zeros(3, dtype=torch.int64))),
        ("lse", lambda: backward(grad, logits, lse.float(), memory, noise)),
        ("lse", lambda: backward(grad, logits, lse[:, :5], memory, noise)),
        ("grad", lambda: backward(grad.float(), logits, lse, memory, noise)),
        ("grad", lambda: backward(grad[..., :2], logits, lse, memory, noise)),
    ]
    for name, call in cases:
        with pytest.raises(RuntimeError, match=name):
            call()


# Runs the kernels on inputs that end right before memory that must not be read.
GUARDED = """
import ctypes, mmap, torch
from mcibi_fast import _build
assert _build.load_extensions()["cpu"] is None
libc = ctypes.CDLL(None, use_errno=True)
PAGE, kept = mmap.PAGESIZE, []

def guarded(values):
    size = values.numel() * values.element_size()
    pages = -(-size // PAGE)
    area = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(start + pages * PAGE), PAGE, 0) == 0
    kept.append(area)
    flat = torch.frombuffer(
        area, dtype=values.dtype, count=values.numel(), offset=pages * PAGE - size
    )
    copy = flat.as_strided(values.shape, values.stride())
    return copy.copy_(values)

g = torch.Generator().manual_seed(0)
kernels = torch.ops.mcibi_fast_cpu
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for B, K, h, w, Z in ((1, 1, 1, 1, 1), (1, 5, 3, 7, 9), (2, 19, 9, 13, 37), (1, 3, 8, 24, 70)):
        for form in (torch.contiguous_format, torch.channels_last):
            def make(*shape):
                t = torch.randn(shape, generator=g).to(dtype)
                return guarded(t.contiguous(memory_format=form))
            logits, grad = make(B, K, h, w), make(B, Z, h, w)
            memory, noise = guarded(torch.randn(K, 2)), guarded(torch.randn(K, Z))
            kernels.gaussian_aggregate(logits, memory, Z, noise, True)
            out, lse = kernels.gaussian_aggregate(logits, memory, Z, noise, False)
            kernels.gaussian_aggregate_backward(grad, logits, guarded(lse), memory, noise)
print("done")
"""


@pytest.mark.slow
def test_reads_nothing_out_of_bounds() -> None:
    if sys.platform != "linux":
        pytest.skip("needs mprotect")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", GUARDED], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr[-2000:]
