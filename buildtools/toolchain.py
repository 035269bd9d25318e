"""Finds what this machine can build with: C++ compiler, torch's headers, nvcc, architectures."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CXX_STANDARD = "-std=c++17"
TORCH_TARGET = "2.10"  # the oldest torch whose stable ABI the libraries use
TORCH_TARGET_DEFINE = "-DTORCH_TARGET_VERSION=0x020a000000000000"

OLDEST_CUDA_ARCH = (8, 0)
DEFAULT_CUDA_ARCHS = "8.0 8.6 8.9 9.0 10.0 12.0"


class Unavailable(Exception):
    """A backend cannot be built on this machine; the message says why and what to do."""


@dataclass(frozen=True)
class Torch:
    """The torch to build against, found without importing it (an isolated build has no numpy)."""

    version: str
    include: Path
    lib: Path


@dataclass(frozen=True)
class Cxx:
    command: list[str]
    description: str


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    version: str
    archs: list[str]  # "9.0", "12.0+PTX"
    notes: list[str]


def find_torch() -> Torch:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "mcibi_fast: torch is not installed in this environment. Install torch>=2.10 first, or "
            "drop --no-build-isolation so that pip installs it for the build."
        )
    root = Path(spec.submodule_search_locations[0])
    version = runpy.run_path(str(root / "version.py"))["__version__"]
    return Torch(version, root / "include", root / "lib")


def cpu_flavours() -> dict[str, list[str]]:
    """The flags of each flavour (instruction set) of the CPU kernels, the oldest CPUs first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"baseline": []}
    v3 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mmovbe"]
    v4 = ["-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"]
    v4.append("-mprefer-vector-width=512")
    return {"baseline": [], "v3": v3, "v4": v3 + v4}


def find_cxx(include: Path) -> Cxx:
    """The C++ compiler, after checking that it compiles torch's headers, which `include` holds."""
    if platform.system() != "Linux":
        raise Unavailable(f"the compiled parts are built on Linux, not on {platform.system()}")
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            break
    else:
        raise Unavailable(
            f"no C++ compiler found (looked for {', '.join(candidates)}): install one, such as "
            "g++ or clang++, or set CXX to one, then install again"
        )
    _probe(command, include)
    lines = _output([*command, "--version"]).splitlines()
    return Cxx(command, lines[0] if lines else command[0])


def _probe(command: list[str], include: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.cpp"
        path.write_text("#include <torch/csrc/stable/library.h>\nint main() {}\n")
        flags = [CXX_STANDARD, TORCH_TARGET_DEFINE, "-fsyntax-only", f"-I{include}"]
        result = subprocess.run([*command, *flags, str(path)], capture_output=True, text=True)
    if result.returncode == 0:
        return
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    why = errors[0] if errors else result.stderr.strip()[-300:]
    raise Unavailable(f"{shlex.join(command)} cannot compile torch's C++17 headers: {why}")


def find_ninja() -> list[str] | None:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    return [found] if found else None


def find_cuda() -> Cuda:
    """nvcc and the architectures to build. Nothing is assumed about the toolkit's folders: nvcc
    itself compiles and links, so a wrapper script outside the toolkit works as well.
    """
    nvcc = _find_nvcc()
    try:
        version = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
        listed = _output([nvcc, "--list-gpu-arch"])
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{nvcc} does not run: {error}") from error
    known = {divmod(int(number), 10) for number in re.findall(r"compute_(\d+)", listed)}
    archs, notes = choose_cuda_archs(known)
    return Cuda(nvcc, version.group(1) if version else "unknown", archs, notes)


def _find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        path = Path(home) / "bin" / "nvcc"
        if not path.is_file():
            raise Unavailable(f"CUDA_HOME is {home}, but there is no {path}")
        return str(path)
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise Unavailable("nvcc not found: install the CUDA toolkit, or set CUDA_HOME to it")
    return found


def choose_cuda_archs(known: set[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """The architectures to compile among those that nvcc knows, and a note for each one left out.

    They are taken from MCIBI_FAST_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX") as they are,
    otherwise from the GPUs of this machine, otherwise from a default list that covers Ampere to
    Blackwell. Where nobody chose, the first architecture of each major version also comes as PTX,
    which the driver compiles for GPUs that have no code of their own.
    """
    chosen = os.environ.get("MCIBI_FAST_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    wanted = chosen or _present_gpus(known) or DEFAULT_CUDA_ARCHS
    archs: list[str] = []
    notes: list[str] = []
    for name in re.split(r"[;,\s]+", wanted.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not match:
            raise Unavailable(f"{name!r} is not a CUDA architecture such as 9.0 or 9.0+PTX")
        number = (int(match[1]), int(match[2]))
        if number < OLDEST_CUDA_ARCH:
            notes.append(f"{name} left out: the kernels need 8.0 or newer")
        elif number not in known:
            notes.append(f"{name} left out: this nvcc does not know it")
        else:
            archs.append(name)
    if not archs:
        raise Unavailable("no CUDA architecture left to build: " + "; ".join(notes))
    return (archs if chosen else _with_ptx(archs)), notes


def archs_for_all_gpus() -> str:
    """What MCIBI_FAST_CUDA_ARCHS must be for the default architectures, whatever GPU is here."""
    return " ".join(_with_ptx(DEFAULT_CUDA_ARCHS.split()))


def _with_ptx(archs: list[str]) -> list[str]:
    """The architectures with PTX of the first one of each major version."""
    majors: set[str] = set()
    result = []
    for arch in archs:
        name, _, ptx = arch.partition("+")
        major = name.partition(".")[0]
        result.append(f"{name}+PTX" if ptx or major not in majors else name)
        majors.add(major)
    return result


def _present_gpus(known: set[tuple[int, int]]) -> str:
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True)
    numbers = set(re.findall(r"^(\d+)\.(\d)$", result.stdout, flags=re.MULTILINE))
    names = []
    for major, minor in sorted((int(a), int(b)) for a, b in numbers):
        if (major, minor) > max(known):  # newer than nvcc: the driver compiles the newest PTX
            names.append("{}.{}+PTX".format(*max(known)))
        else:
            names.append(f"{major}.{minor}")
    return " ".join(names)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
