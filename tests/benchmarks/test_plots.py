"""Pictures of the results: which cases make a curve, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import plots
from benchmarks.cases import Candidate, Case
from benchmarks.harness import run_cases
from benchmarks.results import Result, write


def report(op: str) -> Result:
    def case(K: int, size: int) -> Case:
        both = [Candidate(name, lambda: torch.ones(K, size)) for name in ("reference", "ours")]
        sizes = {"K": K, "map": size, "direction": "forward"}
        return Case(op, sizes, torch.float32, both, bytes=8, flops=K * size)

    sizes = [(19, 8), (150, 8), (19, 16)]
    return run_cases(op, [lambda s=s: case(*s) for s in sizes], "cpu", quick=True)


@pytest.mark.slow
def test_a_curve_joins_cases_that_differ_in_one_size_alone() -> None:
    result = report("toy")
    (title, lines), *rest = plots.curves(result, "K")
    assert not rest and title == "map 8, direction forward, dtype float32"
    assert [x for x, _ in lines["ours"]] == [19, 150] and lines.keys() == {"reference", "ours"}
    ((title, lines),) = plots.curves(result, "N")
    assert title == "K 19, direction forward, dtype float32"
    assert [x for x, _ in lines["reference"]] == [64, 256]


@pytest.mark.slow
def test_pictures_are_written(tmp_path: Path) -> None:
    write(report("toy"), tmp_path / "gpu")
    (tmp_path / "gpu" / "gpu_check.json").write_text(json.dumps({"build": {"ok": True}}))
    (tmp_path / "other.json").write_text(json.dumps({"rows": "of something else"}))
    written = plots.draw(plots.read(tmp_path), tmp_path / "plots")
    kinds = {path.name.partition("-")[0] + path.stem[-2:] for path in written}
    assert len(written) == 3 and {"toy-N", "toy-K"} < kinds
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_without_results_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results"):
        plots.read(tmp_path)
