"""What the benchmarks measure on the machine: times, peak memory, its limits."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]

# ---- time --------------------------------------------------------------------


def interleaved(runs: list[Callable[[], Any]], device: str, budget: float) -> list[list[float]]:
    """Seconds per call of each function, measured in rounds until the budget is spent.

    Each block of calls starts with some that are not counted, 20 ms in all (at most 60 ms including
    the overhead of measuring), so that the allocator and the caches are in the state in which this
    function leaves them, not the one before it: a function that takes less than a millisecond is up
    to three times slower in its first ten calls.
    """
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    once = [_cpu_seconds(lambda run=run: clock(run)) for run in runs]  # loads modules, compiles
    once = [
        _cpu_seconds(lambda run=run: clock(run)) if s < 1 else s
        for run, s in zip(runs, once, strict=True)
    ]
    block = [4 if seconds < 0.05 else 2 if seconds < 0.5 else 1 for seconds in once]
    round_seconds = sum(s * n + max(s, 0.02) for s, n in zip(once, block, strict=True))
    rounds = max(2 if round_seconds > budget else 3, min(25, int(budget / round_seconds)))
    result: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for i in range(len(runs)):
            j = (turn + i) % len(runs)
            warm, begun = 0.0, time.perf_counter()
            while block[j] > 1 and warm < 0.02 and time.perf_counter() < begun + 0.06:
                warm += clock(runs[j])
            result[j] += [clock(runs[j]) for _ in range(block[j])]
    return result


def repeated(run: Callable[[], Any], device: str, budget: float) -> list[float]:
    """Seconds per call of a function that has run before: at least one, until the budget is spent.

    At most 25 calls.
    """
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    times = [clock(run)]
    while sum(times) + times[-1] <= budget and len(times) < 25:
        times.append(clock(run))
    return times


def keep_freed_memory() -> None:
    """Makes glibc reuse freed memory for the rest of the process, as PyTorch does on CUDA.

    Otherwise large results come from fresh pages in some calls and not in others. On many machines
    their page faults cost more than the op, so that mostly page faults would be timed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: everything comes from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: no memory is returned to the system


_clock = time.perf_counter


def count_processor_time() -> None:
    """From now on times on the CPU are those in which this process ran, by all of its threads."""
    global _clock
    _clock = time.process_time


def _cpu_seconds(run: Callable[[], Any]) -> float:
    start = _clock()
    run()
    return _clock() - start


def _cuda_seconds(run: Callable[[], Any]) -> float:
    """Time on the device with cold caches. Launches are queued while the caches are overwritten and
    the device sleeps, about 2 ms; for a function that takes longer to launch, the launches are
    timed.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cache_filler().zero_()
    torch.cuda._sleep(4_000_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_seconds(run: Callable[[], Any]) -> float:
    """Median time in which the host prepares and launches the function's work on the GPU."""
    times = []
    for _ in range(11):
        torch.cuda.synchronize()
        times.append(_cpu_seconds(run))
    torch.cuda.synchronize()
    return sorted(times)[5]


@functools.cache
def _cache_filler() -> Tensor:
    return torch.empty(512 * 2**20, dtype=torch.uint8, device="cuda")


# ---- memory ------------------------------------------------------------------


def peak_extra_memory(run: Callable[[], Any], device: str) -> float | None:
    """Peak memory in MiB that the function needs besides its inputs; None if it is not known.

    The function's result is included. On CUDA the allocator counts it. On Linux it is the peak of
    the process's resident memory, which includes what other libraries than PyTorch allocate.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # returns free memory, so that using it again counts
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident("VmRSS")
    run()
    return max(0.0, _resident("VmHWM") - before) / 2**20


def resident(device: str) -> int:
    """Bytes in use now: by the allocator on CUDA, otherwise by the process (Linux)."""
    return torch.cuda.memory_allocated() if device == "cuda" else _resident("VmRSS")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# ---- the machine -------------------------------------------------------------


def limits(device: str, dtype: torch.dtype, quick: bool = False) -> dict[str, float]:
    """The rates of this machine: GB/s of a copy (read plus written), GFLOP/s of a product."""
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    source = torch.ones((1024 if device == "cuda" else 128) * 2**18, device=device)  # 4 bytes each
    target = torch.empty_like(source)
    n = 8192 if device == "cuda" else 1024 if quick else 2048
    g = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(n, n, generator=g, device=device).to(dtype)
    copy = min(clock(lambda: target.copy_(source)) for _ in range(5))
    product = min(clock(lambda: matrix @ matrix) for _ in range(5))
    return {
        "copy_GB_s": 2 * 4 * source.numel() / copy / 1e9,
        "matmul_GFLOP_s": 2 * n**3 / product / 1e9,
    }
