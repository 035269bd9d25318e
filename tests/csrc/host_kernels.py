"""Compiles CUDA kernels for the host executor (csrc/testing) and loads them through ctypes.

An op's kernels are csrc/<op>/cuda.cu; csrc/testing/<op>_ctypes.cpp holds extern "C" functions
around its launchers. Objects are kept by the hash of what they were made from.
"""

from __future__ import annotations

import ctypes
import enum
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from buildtools import op_header, toolchain

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TESTING = CSRC / "testing"
EXECUTOR = [TESTING / name for name in ("executor.cpp", "state.cpp", "race_checker.cpp")]
# No contraction: __fmul_rn followed by __fadd_rn must round twice.
FLAGS = [
    *["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"],
    *["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"],
    f"-I{CSRC}",
]
KERNEL_FLAGS = f"-include {TESTING}/cuda_dialect.h -fno-threadsafe-statics".split()
RACE_FLAGS = ["-fsanitize=thread"]  # calls race_checker.cpp; the sanitizer itself is not linked
ADDRESS_FLAGS = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class Sync(enum.IntEnum):
    """Kinds of synchronisation sites, as in csrc/testing/threads.h."""

    BARRIER, WARP, FENCE, ASYNC_WAIT, COLLECTIVE = range(5)


@dataclass(frozen=True)
class Site:
    number: int
    kind: Sync
    file: str
    line: int


class HostKernels:
    """A loaded library of kernels, with the executor's controls."""

    def __init__(self, path: Path) -> None:
        self.cdll = ctypes.CDLL(str(path))
        self.cdll.host_last_error.restype = ctypes.c_char_p
        self.cdll.host_set_seed.argtypes = [ctypes.c_uint64]

    def set_seed(self, seed: int) -> None:
        """0: lowest ready thread first, 1: highest; from 2 on drawn."""
        self.cdll.host_set_seed(seed)

    def skip(self, site: Site | None) -> None:
        """Makes one barrier, fence or wait do nothing (None: all work again)."""
        self.cdll.host_skip_site(-1 if site is None else site.number)

    def last_error(self) -> str:
        return self.cdll.host_last_error().decode()

    def sites(self) -> list[Site]:
        """The synchronisation sites met so far by the kernels that ran."""
        found = []
        for number in range(self.cdll.host_site_count()):
            file, line = ctypes.c_char_p(), ctypes.c_int()
            kind = self.cdll.host_site(number, ctypes.byref(file), ctypes.byref(line))
            assert file.value is not None
            found.append(Site(number, Sync(kind), Path(file.value.decode()).name, line.value))
        return found


def sites_in_source(op: str) -> set[tuple[str, int]]:
    """File and line of every barrier, fence and wait in an op's CUDA sources."""
    call = re.compile(r"\b(__syncthreads\w*|__syncwarp|__threadfence|MCIBI_CP_ASYNC_WAIT)\(")
    return {
        (path.name, number)
        for path in sorted((CSRC / op).glob("*.cu*"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if call.search(line.partition("//")[0])
    }


def assert_every_site_is_needed(
    op: str, kernels: HostKernels, run: Callable[[], list[Tensor]], seeds: range
) -> None:
    """Every barrier, fence and wait in the source is met by `run`, and without it `run` gives
    another result or an error under one of the seeds."""
    kernels.set_seed(0)
    right = run()
    sites = [site for site in kernels.sites() if site.kind != Sync.COLLECTIVE]
    assert {(site.file, site.line) for site in sites} == sites_in_source(op)
    unneeded = [site for site in sites if not _is_missed(kernels, site, run, right, seeds)]
    assert not unneeded, f"nothing changes without {unneeded}"


def _is_missed(
    kernels: HostKernels,
    site: Site,
    run: Callable[[], list[Tensor]],
    right: list[Tensor],
    seeds: range,
) -> bool:
    kernels.skip(site)
    try:
        for seed in seeds:
            kernels.set_seed(seed)
            try:
                results = run()
            except RuntimeError:
                return True
            if not all(torch.equal(a, b) for a, b in zip(results, right, strict=True)):
                return True
        return False
    finally:
        kernels.skip(None)
        kernels.set_seed(0)


def compiler() -> str:
    command = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if command is None:
        pytest.skip("needs a C++ compiler (g++ or clang++, or one named by CXX)")
    return command


def load(cache: Path, op: str, *, races: bool = False, defines: str = "") -> HostKernels:
    """The kernels of one op; with `races`, every memory access is held against the others.

    ``defines``: flags of the compiler that change the kernels' constants.
    """
    objects = [_compile(cache, source, ["-O2"]) for source in EXECUTOR]
    extra = [*KERNEL_FLAGS, *defines.split(), *(RACE_FLAGS if races else [])]
    objects.append(_compile(cache, CSRC / op / "cuda.cu", extra))
    objects.append(_compile(cache, TESTING / f"{op}_ctypes.cpp", KERNEL_FLAGS))
    return HostKernels(_link(cache, f"{op}{'_races' if races else ''}.so", objects, ["-shared"]))


def build_test(cache: Path, source: Path) -> Path:
    """A C++ test with the executor, under AddressSanitizer and UBSan."""
    objects = [_compile(cache, path, ADDRESS_FLAGS) for path in [source, *EXECUTOR]]
    return _link(cache, source.stem, objects, ADDRESS_FLAGS)


def build_binding(cache: Path, op: str) -> Path:
    """The op's CUDA binding with its kernels on the executor: a library for
    torch.ops.load_library whose operators, in namespace mcibi_fast_cuda, take CPU tensors."""
    found = toolchain.find_torch()
    schemas = op_header.write(CSRC.parent, cache)
    extra = ["-DMCIBI_HOST_EXECUTOR", toolchain.TORCH_TARGET_DEFINE]
    extra += [f"-I{schemas}", "-isystem", str(found.include)]
    objects = [_compile(cache, source, ["-O2"]) for source in EXECUTOR]
    objects.append(_compile(cache, CSRC / op / "cuda.cu", KERNEL_FLAGS))
    objects.append(_compile(cache, CSRC / op / "binding_cuda.cpp", extra))
    library = ["-shared", "-Wl,--no-as-needed", f"-L{found.lib}", "-ltorch_cpu"]
    return _link(cache, f"{op}_binding.so", objects, library)


def _compile(cache: Path, source: Path, extra: list[str]) -> Path:
    command = [compiler(), *FLAGS, *extra, "-x", "c++"]
    text = subprocess.run([*command, "-E", str(source)], check=True, capture_output=True).stdout
    return _cached(cache, f"{source.stem}.o", text, [*command, "-c", str(source)])


def _link(cache: Path, name: str, objects: list[Path], extra: list[str]) -> Path:
    command = [compiler(), *extra, *map(str, objects)]
    return _cached(cache, name, " ".join(command).encode(), command)


def _cached(cache: Path, name: str, content: bytes, command: list[str]) -> Path:
    """Runs `command -o PATH` unless that has been done for the same content and command."""
    key = hashlib.sha256(content + repr(command).encode()).hexdigest()[:20]
    path = cache / key / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / "lock", "w") as lock:  # the tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(".partial")
            done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
            partial.rename(path)
    return path
