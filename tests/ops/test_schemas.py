"""Schemas, op numbers and defaults are each written in one place, and all that uses them agrees."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from buildtools import op_header
from mcibi_fast import _build
from mcibi_fast._schemas import OPS_WITH_LABELS, SCHEMAS, compiled_schema
from mcibi_fast.ops.dispatch import _ops

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = [name for name, op in _ops.items() if op.public is not None]


def with_backend(backend: str) -> set[str]:
    return {n for n, op in _ops.items() if any(k.backend == backend for k in op.kernels)}


def test_every_operator_is_in_the_table_and_the_table_has_no_others() -> None:
    assert _ops.keys() == SCHEMAS.keys()


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_the_libraries_define_what_the_table_says(backend: str) -> None:
    """Of every operator that Python calls, and of no other."""
    if reason := _build.load_extensions()[backend]:
        pytest.skip(f"needs the {backend} part: {reason}")
    namespace = f"mcibi_fast_{backend}"
    found = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{namespace}::")]
    facts = {"cpu_flavour"} if backend == "cpu" else set()  # csrc/library.cpp
    assert {name.partition("::")[2] for name in found} == with_backend(backend) | facts
    for name in with_backend(backend):
        expected = torch._C.parse_schema(f"{namespace}::{compiled_schema(backend, name)}")
        assert getattr(getattr(torch.ops, namespace), name).default._schema == expected
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"{namespace}::{name}", backend.upper()
        )


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_the_bindings_write_no_schema_of_their_own(backend: str) -> None:
    library = f"STABLE_TORCH_LIBRARY_FRAGMENT(mcibi_fast_{backend}, m)"
    sources = [p.read_text() for p in (ROOT / "csrc").rglob("*binding*.cpp")]
    text = "\n".join(source for source in sources if library in source)
    defined = re.findall(r"m\.def\(([^)]*)\)", text)
    assert sorted(defined) == sorted(f"{backend}_schemas::{n}" for n in with_backend(backend))
    assert set(re.findall(r'm\.impl\("(\w+)"', text)) == with_backend(backend)


def test_only_ops_that_take_labels_report_them() -> None:
    takes_labels = {name for name, schema in SCHEMAS.items() if "Tensor labels" in schema}
    assert set(OPS_WITH_LABELS["cpu"]) == takes_labels
    assert set(OPS_WITH_LABELS["cuda"]) < takes_labels


def test_the_header_has_the_schemas_and_numbers_and_is_written_once(tmp_path: Path) -> None:
    path = op_header.write(ROOT, tmp_path) / "op_schemas.h"
    lines = path.read_text().splitlines()
    for backend in ("cpu", "cuda"):
        start = lines.index(f"namespace mcibi_fast::{backend}_schemas {{")
        for name in SCHEMAS:
            schema = compiled_schema(backend, name)
            assert lines.index(f'inline constexpr char {name}[] = "{schema}";', start) > start
    for number, name in enumerate(OPS_WITH_LABELS["cuda"]):
        assert f"inline constexpr int64_t {name} = {number};" in lines
    before = path.stat()
    op_header.write(ROOT, tmp_path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino


@pytest.mark.parametrize("name", PUBLIC)
def test_defaults_are_those_of_the_public_function_alone(name: str) -> None:
    op = _ops[name]
    assert op.public is not None and op._prepare is not None
    public = inspect.signature(op.public).parameters
    prepare = inspect.signature(op._prepare).parameters
    assert list(prepare) == list(public)
    assert all(p.default is inspect.Parameter.empty for p in prepare.values())


@pytest.mark.parametrize("value", [200, -1, 4, 2**40])
def test_a_cpu_operator_reports_a_wrong_label_as_numbers(value: int) -> None:
    if reason := _build.load_extensions()["cpu"]:
        pytest.skip(f"needs the cpu part: {reason}")
    kernel = torch.ops.mcibi_fast_cpu.upsample_confusion
    logits, labels = torch.zeros(2, 4, 3, 3), torch.zeros(2, 6, 6, dtype=torch.int64)
    report = torch.zeros(6, dtype=torch.int64)
    labels[0, 0, 0] = 9  # ignored
    kernel(logits, labels, 9, False, report)
    assert report.tolist() == [0] * 6
    labels[1, 2, 3] = labels[1, 5, 0] = value
    kernel(logits, labels, 9, False, report)
    assert report.tolist() == [4, 9, value, 1, 2, 3]
    for wrong in (report[:5], report.int(), report.expand(2, 6)):
        with pytest.raises(RuntimeError, match=r"report: expected int64 \(6,\) on the CPU"):
            kernel(logits, labels, 9, False, wrong)


def test_shared_defaults_are_written_in_one_file_alone() -> None:
    literal = re.compile(r"\b(ignore_index: int = 255|momentum: float = 0\.1)\b")
    package = ROOT / "mcibi_fast"
    found = [
        path.name
        for folder in ("ops", "nn", "models", "reports", "training", "inference", "metrics")
        for path in (package / folder).rglob("*.py")
        if literal.search(path.read_text())
    ]
    assert not found
