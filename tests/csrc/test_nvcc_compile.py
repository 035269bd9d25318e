"""nvcc compiles every CUDA source for sm_80 and sm_90, within the budgets of registers, spills and
shared memory in nvcc_budgets.json.

A compiler version or a source without a row there fails and prints the row to add.

The machine code's loops are held to a number of instructions for each element, which limits them
where neither memory nor the multiplications do.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from buildtools.plan import NVCC_FLAGS
from buildtools.toolchain import Unavailable, find_cuda
from tests.csrc import sass

CSRC = Path(__file__).resolve().parents[2] / "csrc"
BUDGETS = Path(__file__).with_name("nvcc_budgets.json")
SOURCES = sorted(CSRC.glob("*/cuda.cu"))

pytestmark = pytest.mark.slow

Figures = dict[str, dict[str, int]]  # kernel -> registers, spill_bytes, shared_bytes


@pytest.fixture(scope="module")
def nvcc() -> tuple[str, str]:
    """The compiler and its version."""
    try:
        cuda = find_cuda()
    except Unavailable as error:
        pytest.skip(f"needs nvcc: {error}")
    return cuda.nvcc, cuda.version


def _compile(cache: Path, nvcc: str, source: Path, arch: str) -> Path:
    """The file of what ptxas says, beside the cubin; kept by the content of all CUDA sources."""
    flags = [flag for flag in NVCC_FLAGS if "fPIC" not in flag and flag != "-Xcompiler"]
    command = [nvcc, *flags, "-cubin", f"-arch={arch}", "-Xptxas", "-v", f"-I{CSRC}", str(source)]
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")]
    content = b"".join(path.read_bytes() for path in [source, *sorted(headers)])
    key = hashlib.sha256(content + repr(command).encode()).hexdigest()[:20]
    log = cache / f"nvcc-{source.parent.name}-{arch}-{key}.log"
    if not log.exists():
        done = subprocess.run(
            [*command, "-o", str(log.with_suffix(".cubin"))], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        log.write_text(done.stderr)
    return log


def _figures(log: str) -> Figures:
    """The largest figures among each kernel template's instances."""
    kernel = re.compile(
        r"Compiling entry function '(\w+)'[^\n]*\n[^\n]*\n"
        r"\s*\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r"[^\n]*Used (\d+) registers([^\n]*)"
    )
    figures: Figures = {}
    for mangled, stores, loads, registers, rest in kernel.findall(log):
        name = _plain_name(mangled)
        shared = re.search(r"(\d+) bytes smem", rest)
        found = {
            "registers": int(registers),
            "spill_bytes": int(stores) + int(loads),
            "shared_bytes": int(shared.group(1)) if shared else 0,
        }
        before = figures.setdefault(name, found)
        figures[name] = {key: max(before[key], found[key]) for key in found}
    return figures


def _plain_name(mangled: str) -> str:
    """The kernel's name; its float64 instances, far larger and not for speed, stand apart.

    In a mangled name every identifier stands behind its length, and `d` is double.
    """
    for length in re.finditer(r"\d+", mangled):
        end = length.end() + int(length.group())
        name = mangled[length.end() : end]
        if name.endswith("_kernel"):
            return f"{name} float64" if re.match(r"I\w?d", mangled[end:]) else name
    raise AssertionError(f"a kernel's name ends in _kernel, unlike {mangled}")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
@pytest.mark.thinned(only={"arch": ["sm_90"]})
def test_budgets(compile_cache: Path, nvcc: tuple[str, str], source: Path, arch: str) -> None:
    path, version = nvcc
    figures = _figures(_compile(compile_cache, path, source, arch).read_text())
    assert figures, "no kernels"
    op = source.parent.name
    budgets = json.loads(BUDGETS.read_text()).get(version, {}).get(arch, {}).get(op)
    if budgets is None:
        row = json.dumps({version: {arch: {op: figures}}})
        pytest.fail(f"no budgets for nvcc {version} in {BUDGETS.name}; add {row}", pytrace=False)
    assert figures.keys() == budgets.keys()
    for name, found in figures.items():
        over = {key: n for key, n in found.items() if n > budgets[name][key]}
        assert not over, f"{name} on {arch} is above its budget {budgets[name]}: {found}"


@pytest.mark.parametrize(
    ("op", "kernel", "element", "most"),
    [
        # A label of a cell, read for the first time; cells of one class are not read again. It
        # was 22.1 before such cells were told apart, and 50 for the second time.
        ("memory_update", "class_weights_kernelIhf", "LDG", 7.6),
        ("memory_update", "class_weights_kernelIlf", "LDG", 11.6),
        # A multiplication of a feature (NCHW in bfloat16, in float32) by a weight. Half of them are
        # for tiles with features that are not finite; it was 6.9 with one way for both, and 3.8
        # while each step of a row of 64 pixels was left out where the class has no weight.
        ("memory_update", "class_sums_kernelI13__nv_bfloat16fLNS_4FillE0E", "FFMA", 3.1),
        ("memory_update", "class_sums_kernelIffLNS_4FillE0E", "FFMA", 3.1),
        # An exponential, forward, after the loop over the corners. It was 9.2 relative to the
        # largest logit so far.
        ("upsample_cross_entropy", "cross_entropy_kernelI13__nv_bfloat16Lb1E", "MUFU.EX2", 6.7),
        # Backward, without smoothing, of classes that no pixel of a column has as its label. It was
        # 12.8 for all.
        (
            *("upsample_cross_entropy", "cross_entropy_backward_kernelI13__nv_bfloat16Lb0E"),
            *("MUFU.EX2 shortest", 8.0),
        ),
        # An exponential with its share of the loss and the gradient, for K=150 and K=19, when a
        # column of eight pixels counts. It does not include what each class of the column's labels
        # adds, 46 instructions for the column.
        *[
            ("upsample_cross_entropy", f"cross_entropy_one_pass_kernelILi{n}ELb0E", way, most)
            for n, way, most in [(5, "MUFU.EX2 past STS", 10.0), (3, "MUFU.EX2 past STS", 11.8)]
        ],
    ],
)
def test_instructions_for_each_element(
    compile_cache: Path, nvcc: tuple[str, str], op: str, kernel: str, element: str, most: float
) -> None:
    triton = pytest.importorskip("triton", reason="needs Triton, which brings cuobjdump")
    path, version = nvcc
    if version != "13.0":
        pytest.skip(f"the numbers are for nvcc 13.0, this is {version}")
    cubin = _compile(compile_cache, path, CSRC / op / "cuda.cu", "sm_90").with_suffix(".cubin")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (code,) = (c for name, c in sass.functions(cuobjdump, cubin).items() if kernel in name)
    name, *way = element.split()
    if way[:1] == ["past"]:
        assert sass.on_the_way(code, name, way[1]) <= most
    else:
        assert sass.per_element(code, name, bool(way)) <= most


def test_loops_are_found_in_machine_code() -> None:
    """Two loops inside one another, and the branch to itself with which a kernel ends."""
    lines = ["MOV R1, c[0x0][0x28]", "LDG.E R2, [R4]", "MUFU.EX2 R3, R2", "FADD R5, R5, R3"]
    lines += ["@!P0 BRA 0x10", "@P1 BRA 0x0", "BRA 0x60"]
    text = "".join(
        f"        /*{16 * i:04x}*/                   {s} ;\n" for i, s in enumerate(lines)
    )
    code = sass.instructions(text)
    assert [i.name for i in code][:3] == ["MOV", "LDG.E", "MUFU.EX2"]
    (loop,) = sass.innermost_loops(code)
    assert (loop[0].address, loop[-1].address) == (0x10, 0x40)
    assert sass.per_element(code, "MUFU.EX2") == 4


def test_the_way_through_a_loop_passes_by_rare_code() -> None:
    """Around code that stores, not around other code, and along branches without a condition."""
    lines = ["MUFU.EX2 R3, R2", "@P0 BRA 0x30", "STS [R1], R3", "@P1 BRA 0x50", "BRA 0x70"]
    lines += ["FADD R5, R5, R3", "MUFU.EX2 R3, R2", "@P0 BRA 0x0", "BRA 0x80"]
    text = "".join(
        f"        /*{16 * i:04x}*/                   {s} ;\n" for i, s in enumerate(lines)
    )
    code = sass.instructions(text)
    assert sass.on_the_way(code, "MUFU.EX2", "STS") == 5  # EX2, BRA, BRA, BRA, BRA
    assert sass.on_the_way(code, "MUFU.EX2", "LDG") == 6
