"""The traps of building and installing: compilers, nvcc, architectures, what is said afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mcibi_fast
from mcibi_fast import _build
from mcibi_fast.ops.compiled import cuda_kernel

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "buildtools").is_dir():
    pytest.skip("needs the source tree (buildtools/)", allow_module_level=True)
sys.path.insert(0, str(ROOT))
from buildtools import build as build_module  # noqa: E402
from buildtools import plan, toolchain  # noqa: E402
from buildtools.toolchain import Unavailable  # noqa: E402

FOLDER = Path(_build.__file__).parent
KNOWN = {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}  # nvcc 13.0's, in part
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
needs_record = pytest.mark.skipif(
    not (FOLDER / "_build_record.json").is_file(),
    reason="needs a build: pip install . or python setup.py build_ext --inplace",
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MCIBI_FAST_CPU", "MCIBI_FAST_CUDA", "MCIBI_FAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)


def program(folder: Path, name: str, script: str) -> Path:
    """An executable shell script on its own folder."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def source_tree(root: Path, kernel: str = "") -> Path:
    """A project with one CUDA source and the smallest CPU part."""
    (root / "csrc" / "op").mkdir(parents=True)
    (root / "csrc" / "library.cpp").write_text("int loaded = 1;\n")
    (root / "csrc" / "op" / "cuda.cu").write_text(kernel)
    (root / "mcibi_fast").mkdir()
    (root / "mcibi_fast" / "version.py").write_text('__version__ = "0.0.0"\n')
    shutil.copy(ROOT / "mcibi_fast" / "_schemas.py", root / "mcibi_fast")
    return root


# --- architectures ------------------------------------------------------------------------------


def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_present_gpus", lambda known: "")


def test_no_gpu_and_no_list_builds_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpus(monkeypatch)
    archs, notes = toolchain.choose_cuda_archs(KNOWN)
    assert archs == ["8.0+PTX", "8.6", "8.9", "9.0+PTX", "10.0+PTX", "12.0+PTX"]
    assert notes == []


def test_an_older_nvcc_leaves_out_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpus(monkeypatch)
    archs, notes = toolchain.choose_cuda_archs({(8, 0), (8, 6), (8, 9), (9, 0)})
    assert archs == ["8.0+PTX", "8.6", "8.9", "9.0+PTX"]
    assert [note.split()[0] for note in notes] == ["10.0", "12.0"]


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ("9.0\n9.0\n", ["9.0+PTX"]),
        ("8.6\n8.9\n9.0\n", ["8.6+PTX", "8.9", "9.0+PTX"]),
        ("13.0\n", ["12.0+PTX"]),
    ],
)
def test_present_gpus_are_built_for(
    reported: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "nvidia-smi", f"printf '{reported.encode('unicode_escape').decode()}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert toolchain.choose_cuda_archs(KNOWN)[0] == expected


def test_an_old_gpu_alone_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", "echo 7.5")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(Unavailable, match=r"7\.5 left out: the kernels need 8\.0"):
        toolchain.choose_cuda_archs(KNOWN)


def test_lists_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0 9.0a+PTX")
    archs, notes = toolchain.choose_cuda_archs(KNOWN)
    assert archs == ["8.0", "9.0a+PTX"]
    assert notes == ["7.5 left out: the kernels need 8.0 or newer"]
    assert plan.gencode_flags(archs) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    monkeypatch.setenv("MCIBI_FAST_CUDA_ARCHS", "8.6")
    assert toolchain.choose_cuda_archs(KNOWN)[0] == ["8.6"]
    monkeypatch.setenv("MCIBI_FAST_CUDA_ARCHS", "Hopper")
    with pytest.raises(Unavailable, match="'Hopper' is not a CUDA architecture such as"):
        toolchain.choose_cuda_archs(KNOWN)


# --- compilers ----------------------------------------------------------------------------------


def test_no_compiler_is_a_python_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    out = tmp_path / "package"
    out.mkdir()
    (out / "_cpu.so").write_text("left by an earlier build")
    record = build_module.build(source_tree(tmp_path / "src"), out, tmp_path / "temp")
    assert not record["cpu"]["built"]
    assert "no C++ compiler found (looked for no-such-compiler)" in record["cpu"]["reason"]
    assert not record["cuda"]["built"]
    assert json.loads((out / build_module.RECORD).read_text()) == record
    assert [path.name for path in out.iterdir()] == [build_module.RECORD]
    text = build_module.describe(record)
    assert "cpu   NOT built" in text
    assert "works without them, in plain PyTorch" in text


@needs_record
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_what_was_built_knows_nothing_of_python() -> None:
    """So that one wheel serves all Pythons: it uses no symbol of the interpreter."""
    libraries = [p for p in (FOLDER / "_cpu.so", FOLDER / "_cuda.so") if p.is_file()]
    if not libraries:
        pytest.skip("needs a compiled part")
    for library in libraries:
        command = ["nm", "--dynamic", "--undefined-only", str(library)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = [line.split()[-1] for line in found.splitlines()]
        assert "aoti_torch_get_size" in names or "aoti_torch_get_sizes" in names, names
        assert [name for name in names if name.startswith(("Py", "_Py"))] == []


def test_an_old_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = program(tmp_path, "old-c++", "echo 'x.h:1: error: no such standard' >&2; exit 1")
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(Unavailable, match=r"cannot compile torch's C\+\+17 headers: x\.h:1: error"):
        toolchain.find_cxx(tmp_path)


def test_torch_is_found_without_importing_it() -> None:
    code = (
        "import sys; from buildtools import toolchain; torch = toolchain.find_torch(); "
        "assert 'torch' not in sys.modules; print(torch.version)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == torch.__version__


# --- nvcc ---------------------------------------------------------------------------------------


def cuda_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, nvcc: Path
) -> dict[str, object]:
    """The CUDA half of a build of one small kernel with the given nvcc first on the path."""
    monkeypatch.setenv("PATH", f"{nvcc.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("MCIBI_FAST_CUDA_ARCHS", "8.0")
    root = source_tree(tmp_path / "src", kernel)
    return build_module.build(root, tmp_path / "package", tmp_path / "temp")["cuda"]


@needs_nvcc
def test_no_part_needs_headers_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are often missing, above all where a GPU is."""
    nvcc = Path(shutil.which("nvcc") or "").resolve()
    record = cuda_build(tmp_path, monkeypatch, "__global__ void f() {}\n", nvcc)
    assert record["built"] and record["archs"] == ["8.0"]
    assert (tmp_path / "package" / "_cuda.so").is_file()
    whole = json.loads((tmp_path / "package" / build_module.RECORD).read_text())
    assert whole["cpu"]["built"] and (tmp_path / "package" / "_cpu.so").is_file()
    headers = sysconfig.get_paths()["include"]
    commands = [path.read_text() for path in (tmp_path / "temp").glob("*.ninja")]
    assert len(commands) == 2 and not any(headers in text for text in commands)


def test_the_cpu_part_may_stay_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCIBI_FAST_CUDA", "0")
    monkeypatch.setenv("MCIBI_FAST_CPU", "0")
    root, out = source_tree(tmp_path / "src"), tmp_path / "out"
    record = build_module.build(root, out, tmp_path / "temp")
    assert record["cpu"] == {"built": False, "reason": "MCIBI_FAST_CPU=0"}
    built = {"built": True, "compiler": "an earlier one", "flavours": ["baseline"]}
    (root / "mcibi_fast" / build_module.RECORD).write_text(json.dumps({**record, "cpu": built}))
    (root / "mcibi_fast" / "_cpu.so").write_text("the library")
    assert build_module.build(root, out, tmp_path / "temp")["cpu"] == built
    assert (out / "_cpu.so").read_text() == "the library"
    (root / "mcibi_fast" / "version.py").write_text('__version__ = "0.0.1"\n')
    assert not build_module.build(root, out, tmp_path / "temp")["cpu"]["built"]


def test_a_change_of_the_cuda_sources_shows(tmp_path: Path) -> None:
    root = source_tree(tmp_path, "a")
    first = plan.cuda_digest(root)
    (root / "csrc" / "library.cpp").write_text("the CPU's")
    assert plan.cuda_digest(root) == first
    (root / "csrc" / "op" / "cuda.cu").write_text("b")
    assert plan.cuda_digest(root) != first


@pytest.mark.slow
@needs_nvcc
def test_an_nvcc_outside_its_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper script on the path is enough; the library needs no CUDA runtime of its own."""
    real = Path(shutil.which("nvcc") or "").resolve()
    wrapper = program(tmp_path / "bin", "nvcc", f'exec {real} "$@"')
    kernel = "#include <cuda_runtime.h>\n__global__ void f() {}\nvoid g() { f<<<1, 1>>>(); }\n"
    record = cuda_build(tmp_path, monkeypatch, kernel, wrapper)
    assert record["built"], record
    assert record["nvcc"] == str(wrapper)
    dynamic = subprocess.run(
        ["readelf", "-d", str(tmp_path / "package" / "_cuda.so")], capture_output=True, text=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch_cuda.so" in needed
    assert not [name for name in needed if "cudart" in name]


FAILING_NVCC = """case "$1" in
--version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;
--list-gpu-arch) echo compute_80;;
*) echo 'cuda.cu(1): error: expected a declaration'; exit 2;;
esac"""


def test_a_failing_cuda_part_is_dropped_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = program(tmp_path / "bin", "nvcc", FAILING_NVCC)
    record = cuda_build(tmp_path, monkeypatch, "", nvcc)
    assert not record["built"]
    assert record["reason"] == "it did not compile: cuda.cu(1): error: expected a declaration"
    assert (tmp_path / "package" / "_cpu.so").is_file()


def test_a_forced_cuda_part_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = program(tmp_path / "bin", "nvcc", FAILING_NVCC)
    monkeypatch.setenv("MCIBI_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="MCIBI_FAST_CUDA=1, but it did not compile"):
        cuda_build(tmp_path, monkeypatch, "", nvcc)


def test_cuda_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCIBI_FAST_CUDA", "0")
    record = build_module.build(source_tree(tmp_path / "src"), tmp_path / "out", tmp_path / "temp")
    assert record["cuda"] == {"built": False, "reason": "MCIBI_FAST_CUDA=0"}
    assert record["cpu"]["built"]


def test_a_wrong_cuda_home_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match=f"CUDA_HOME is {tmp_path}, but there is no"):
        toolchain.find_cuda()


@pytest.mark.slow
def test_without_ninja_the_build_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "find_ninja", lambda: None)
    monkeypatch.setenv("MCIBI_FAST_CUDA", "0")
    build_module.build(source_tree(tmp_path / "src"), tmp_path / "out", tmp_path / "temp")
    code = f"import torch; torch.ops.load_library({str(tmp_path / 'out' / '_cpu.so')!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- afterwards ---------------------------------------------------------------------------------


def test_one_version_number() -> None:
    assert mcibi_fast.__version__ == metadata.version("mcibi-fast")
    assert mcibi_fast.build_info()["version"] == mcibi_fast.__version__


@needs_record
def test_build_info_accounts_for_every_backend() -> None:
    info = mcibi_fast.build_info()
    assert set(info["backends"]) == {"reference", "cpu", "cuda", "triton", "sdpa", "pytorch"}
    assert info["backends"]["reference"] is True
    for state in info["backends"].values():
        assert state is True or (isinstance(state, str) and state)
    if info["backends"]["cpu"] is True:
        assert info["cpu_flavour"] in info["cpu_flavours"]


@needs_record
@pytest.mark.parametrize("part", ["cpu", "cuda"])
def test_what_was_built_loads(part: str) -> None:
    """A library with a symbol that nothing defines links, and shows only here."""
    record = _build._record()
    if not record[part]["built"]:
        pytest.skip(f"needs a build with {part}: {record[part]['reason']}")
    if part == "cuda" and torch.version.cuda is None:
        pytest.skip("needs a torch with CUDA")
    assert _build.load_extensions()[part] is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "not built: run pip install"),
        ({"version": "0.0.1"}, "built for version 0.0.1"),
        (
            {"version": mcibi_fast.__version__, "cpu": {"built": False, "reason": "no compiler"}},
            "not built: no compiler",
        ),
    ],
)
def test_a_missing_build_is_a_reason(record: dict[str, object], reason: str) -> None:
    assert reason in (_build._load_cpu(record) or "")


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        ("9.0", "9.0", "8.0 8.9 10.0 12.0"),
        ("8.0", "8.0 8.6 8.9", "7.5 9.0"),
        ("8.6", "8.6 8.9", "8.0 9.0"),
        ("8.0+PTX 9.0", "8.0 8.9 9.0 10.0 12.0", "7.5"),
        ("9.0a+PTX", "9.0", "8.0 10.0"),
        ("10.0f", "10.0 10.3", "9.0 12.0"),
        ("8.0+PTX 8.6 8.9 9.0+PTX 10.0+PTX 12.0+PTX", "8.0 8.7 9.0 10.3 11.0 12.1 13.0", "7.5"),
    ],
)
def test_which_gpus_can_run_what_was_built(archs: str, runs: str, does_not: str) -> None:
    def why_not(gpu: str) -> str | None:
        major, minor = map(int, gpu.split("."))
        return _build.no_code_for(archs.split(), (major, minor))

    assert [gpu for gpu in runs.split() if why_not(gpu)] == []
    for gpu in does_not.split():
        reason = why_not(gpu) or ""
        assert f"this GPU is {gpu}: build again with MCIBI_FAST_CUDA_ARCHS={gpu}" in reason


def test_a_part_for_other_gpus_is_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads, and would fail at the first launch."""
    loaded = dict.fromkeys(("reference", "cpu", "cuda", "triton", "sdpa"))
    record = {"version": mcibi_fast.__version__, "cuda": {"built": True, "archs": ["9.0"]}}
    monkeypatch.setattr(_build, "load_extensions", lambda: {**loaded, "cpu": "not built"})
    monkeypatch.setattr(_build, "_record", lambda: record)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    gpus = [(8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    why_not = cuda_kernel("gaussian_aggregate").why_not
    on = [SimpleNamespace(device=torch.device("cuda", i)) for i in range(2)]
    monkeypatch.setattr("mcibi_fast.ops.compiled.Tensor", SimpleNamespace)
    _build.why_not_on.cache_clear()
    try:
        assert "built for 9.0, and this GPU is 8.6" in (why_not(on[0]) or "")
        assert why_not(on[1]) is None
        assert _build.build_info()["backends"]["cuda"] is True  # of the second GPU
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert "this GPU is 8.6" in _build.build_info()["backends"]["cuda"]
    finally:
        _build.why_not_on.cache_clear()


def test_a_library_that_does_not_load_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_cpu.so").write_text("of another processor")
    monkeypatch.setattr(_build, "_FOLDER", tmp_path)
    record = {"version": mcibi_fast.__version__, "cpu": {"built": True}}
    assert re.match(r"_cpu\.so does not load: .*_cpu\.so", _build._load_cpu(record) or "")


@needs_record
@pytest.mark.parametrize("load", [_build._load_cpu, _build._load_cuda])
def test_libraries_of_older_sources_are_a_reason(
    load: Callable[[dict[str, Any]], str | None],
) -> None:
    """Their operators may take other arguments."""
    record = _build._record()
    if reason := load(record):
        pytest.skip(f"needs the compiled part: {reason}")
    assert "built from older sources" in (load({**record, "schemas": "others"}) or "")
    del record["schemas"]
    assert "built from older sources" in (load(record) or "")


@pytest.mark.slow
@needs_record
def test_an_unknown_cpu_flavour_is_named() -> None:
    if mcibi_fast.build_info()["backends"]["cpu"] is not True:
        pytest.skip(f"needs _cpu: {mcibi_fast.build_info()['backends']['cpu']}")
    result = subprocess.run(
        [sys.executable, "-c", "import mcibi_fast; mcibi_fast.build_info()"],
        env={**os.environ, "MCIBI_FAST_CPU": "v5"},
        capture_output=True,
        text=True,
    )
    assert "MCIBI_FAST_CPU=v5: expected baseline, v3 or v4" in result.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_no_wide_instruction_outside_its_flavour() -> None:
    """A function shared by the flavours must be the plainest one's, or older CPUs crash."""
    library = FOLDER / "_cpu.so"
    if not library.is_file() or len(toolchain.cpu_flavours()) == 1:
        pytest.skip("needs _cpu on x86-64")
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    wide, name = set(), ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            name = line.split("<")[1]
        elif "%zmm" in line or "%ymm" in line or "%k1" in line:
            wide.add((name, "%ymm" in line and "%zmm" not in line))
    assert wide, "the flavours hold no wide instructions at all"
    leaked = [n for n, only_ymm in wide if "2v4" not in n and not (only_ymm and "2v3" in n)]
    assert leaked == []
