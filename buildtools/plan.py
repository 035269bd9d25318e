"""Which source becomes which object and library, and the commands for it.

csrc/library.cpp, csrc/common/*.cpp, csrc/<op>/binding_cpu.cpp   once            -> _cpu.so
csrc/<op>/cpu.cpp                                                per CPU flavour -> _cpu.so
csrc/<op>/cuda.cu, csrc/<op>/binding_cuda.cpp                    once, by nvcc   -> _cuda.so

Both are plain libraries on torch's stable ABI, which know nothing of Python.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from buildtools import op_header, toolchain
from buildtools.toolchain import Cuda, Cxx, Torch

# -fno-math-errno and -fno-trapping-math change no result; without them no loop with sqrt or a
# comparison vectorises. GCC and Clang may fuse a multiplication with an addition: code that must
# round twice says so itself.
CXX_FLAGS = [
    *[toolchain.CXX_STANDARD, toolchain.TORCH_TARGET_DEFINE, "-O3", "-DNDEBUG"],
    *["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"],
    *["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"],
]
NVCC_FLAGS = [
    *[toolchain.CXX_STANDARD, toolchain.TORCH_TARGET_DEFINE, "-O3", "-DNDEBUG", "-DUSE_CUDA"],
    *["--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"],
]


@dataclass(frozen=True)
class Step:
    """One call of a compiler or linker; repeated if an input, a header or the command changes."""

    output: Path
    inputs: list[Path]
    command: list[str]
    compiles: bool = True


@dataclass
class Plan:
    steps: list[Step] = field(default_factory=list)

    def add(self, output: Path, inputs: list[Path], command: list[str], *, compiles: bool) -> Path:
        self.steps.append(Step(output, inputs, command, compiles))
        return output


def library_sources(csrc: Path) -> list[Path]:
    shared = [csrc / "library.cpp", *sorted(csrc.glob("common/*.cpp"))]
    return shared + sorted(csrc.glob("*/binding_cpu.cpp"))


def kernel_sources(csrc: Path) -> list[Path]:
    return sorted(csrc.glob("*/cpu.cpp"))


def cuda_sources(csrc: Path) -> list[Path]:
    return sorted(csrc.glob("*/cuda.cu")) + sorted(csrc.glob("*/binding_cuda.cpp"))


def cuda_digest(root: Path) -> str:
    """Tells whether a library was built from these sources of the CUDA part."""
    csrc = root / "csrc"
    headers = [path for kind in ("*.h", "*.cuh") for path in csrc.rglob(kind)]
    files = [path for path in headers if "testing" not in path.parts] + cuda_sources(csrc)
    content = hashlib.sha256()
    for path in sorted(files):
        content.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return content.hexdigest()[:16]


def _object_name(csrc: Path, source: Path) -> str:
    """A different name for every source, since each op has a cpu.cpp."""
    return "_".join(source.relative_to(csrc).with_suffix("").parts)


def flavour_defines(flavour: str) -> list[str]:
    return [f"-DMCIBI_CPU_ARCH={flavour}"]


def common_defines() -> list[str]:
    return ["-DMCIBI_CPU_FLAVOURS=1"] if len(toolchain.cpu_flavours()) > 1 else []


def cpu_plan(root: Path, out: Path, temp: Path, cxx: Cxx, torch: Torch) -> Plan:
    """The library _cpu. Flavours for older CPUs come first on the link line: if several objects
    contain the same inline function, the linker keeps the first, which must not use instructions
    that an older CPU lacks."""
    csrc = root / "csrc"
    folders = [csrc, op_header.write(root, temp), torch.include]
    includes = [f"-I{folder}" for folder in folders]
    flags = [*CXX_FLAGS, *common_defines(), *includes]
    plan = Plan()
    objects = []

    def compile_one(source: Path, name: str, extra: list[str]) -> None:
        obj = temp / f"{name}.o"
        command = [*cxx.command, *flags, *extra, "-c", str(source), "-o", str(obj)]
        objects.append(plan.add(obj, [source], command, compiles=True))

    for source in library_sources(csrc):
        compile_one(source, _object_name(csrc, source), [])
    for flavour, flavour_flags in toolchain.cpu_flavours().items():
        for source in kernel_sources(csrc):
            extra = [*flavour_flags, *flavour_defines(flavour)]
            compile_one(source, f"{_object_name(csrc, source)}.{flavour}", extra)

    library = out / "_cpu.so"
    link = [*cxx.command, "-shared", *map(str, objects), "-o", str(library)]
    plan.add(library, objects, [*link, f"-L{torch.lib}", "-ltorch_cpu"], compiles=False)
    return plan


def cuda_plan(root: Path, out: Path, temp: Path, cxx: Cxx, torch: Torch, cuda: Cuda) -> Plan:
    """The library _cuda, compiled and linked by nvcc with the static CUDA runtime.

    It is linked against an empty stand-in for libtorch_cuda, so that building with a CPU-only torch
    gives a library with the same dependencies.
    """
    csrc = root / "csrc"
    nvcc = [cuda.nvcc, "-ccbin", cxx.command[-1]]
    includes = [f"-I{folder}" for folder in (csrc, op_header.write(root, temp), torch.include)]
    flags = [*NVCC_FLAGS, *gencode_flags(cuda.archs), *includes]
    plan = Plan()
    objects = []
    for source in cuda_sources(csrc):
        obj = temp / f"{_object_name(csrc, source)}.o"
        command = [*nvcc, *flags, "-c", str(source), "-o", str(obj)]
        objects.append(plan.add(obj, [source], command, compiles=True))

    stub_source = temp / "empty.cpp"
    if not stub_source.exists():
        stub_source.touch()
    stub = temp / "libtorch_cuda.so"
    soname = f"-Wl,-soname,{stub.name}"
    stub_command = [*cxx.command, "-shared", soname, str(stub_source), "-o", str(stub)]
    plan.add(stub, [stub_source], stub_command, compiles=False)

    library = out / "_cuda.so"
    link = [*nvcc, "-shared", "-cudart", "static", *map(str, objects), "-o", str(library)]
    torch_libs = ["-Xlinker", "--no-as-needed", f"-L{temp}", "-ltorch_cuda"]
    torch_libs += [f"-L{torch.lib}", "-ltorch_cpu"]
    plan.add(library, [*objects, stub], [*link, *torch_libs], compiles=False)
    return plan


def gencode_flags(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildFailed(Exception):
    """A compiler or linker failed; the message is its output."""


def run(plan: Plan, temp: Path, name: str, jobs: int) -> None:
    """Runs the steps: incrementally with ninja if it is installed, otherwise all of them."""
    ninja = toolchain.find_ninja()
    if ninja:
        path = temp / f"{name}.ninja"
        path.write_text(f"builddir = {temp}\n" + _ninja_text(plan))
        _call([*ninja, "-f", str(path), "-j", str(jobs)])
        return
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(_call, [s.command for s in plan.steps if s.compiles]))
    for step in plan.steps:
        if not step.compiles:
            _call(step.command)


def _call(command: list[str]) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, end="", flush=True)
    if result.returncode != 0:
        raise BuildFailed(result.stdout.strip() or f"{shlex.join(command)} failed")


def _ninja_text(plan: Plan) -> str:
    def path(p: Path) -> str:
        return str(p).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    lines = [
        "rule compile",
        "  command = $cmd -MD -MF $out.d",
        "  description = $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cmd",
        "  description = $out",
    ]
    for step in plan.steps:
        rule = "compile" if step.compiles else "link"
        lines.append(f"build {path(step.output)}: {rule} " + " ".join(map(path, step.inputs)))
        lines.append("  cmd = " + shlex.join(step.command).replace("$", "$$"))
    return "\n".join(lines) + "\n"
