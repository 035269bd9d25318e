"""What gpu_check does with stages that fail, and when its time is up; it needs no GPU for that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Check
from benchmarks.gpu_stages import backends, paper_cases
from benchmarks.harness import Candidate, Case, run_cases
from tests.ops.table import attention_case


@pytest.mark.slow
def test_a_stage_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    check = Check("cpu", 2.0, out, tmp_path)
    check.run({"no_such_stage": 60.0, "hot_path": 60.0})
    report = json.loads(out.read_text())
    assert not report["no_such_stage"]["ok"]
    assert "no_such_stage" in report["no_such_stage"]["error"]
    assert report["hot_path"]["ok"] and "GPU" in report["hot_path"]["skipped"]


def test_a_stage_that_hangs_is_stopped(tmp_path: Path) -> None:
    check = Check("cpu", 2.0, tmp_path / "report.json", tmp_path)
    running = check.start("environment", 60.0)
    assert running is not None
    check.finish(running)  # as when its time is up
    assert not check.report["environment"]["ok"]
    assert "stopped after" in check.report["environment"]["error"]
    assert running.process.returncode == -9


def test_no_stage_begins_when_time_is_up(tmp_path: Path) -> None:
    check = Check("cpu", 0.1, tmp_path / "report.json", tmp_path)
    check.run({"accuracy": 60.0})
    assert check.report["accuracy"]["skipped"] == "no time was left"


def test_every_benchmark_has_its_turn() -> None:
    found = {p.stem for p in Path(gpu_check.__file__).parent.glob("bench_*.py")}
    assert set(gpu_check.benchmarks()) == found
    seconds = sum((gpu_check.benchmarks() | gpu_check.TABLE7).values()) + max(
        gpu_check.BESIDE.values()
    )
    assert seconds < 60 * 7.5


@pytest.mark.slow
def test_the_summary_has_a_line_per_case() -> None:
    both = [Candidate(name, lambda: torch.ones(3)) for name in ("eager", "ours")]
    cases = [Case("toy", {"K": K}, torch.float32, both, 4, 1) for K in (19, 150)]
    report = run_cases("toy", [lambda c=c: c for c in cases], "cpu", quick=True)
    lines = list(gpu_check.summary([report]))
    assert len(lines) == 2 and lines[1].startswith("toy 150 float32: ")
    assert "of copy; eager" in lines[0]


def test_kernels_without_float64_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = attention_case(5, 7, 16, 16, "toy")
    assert "triton" not in case.backends()
    assert {"triton", "sdpa"} <= set(backends(case, torch.float32))
    assert {c.name for c in paper_cases("cuda")} == {c.name for c in paper_cases("cpu")}
