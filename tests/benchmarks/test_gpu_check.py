"""What gpu_check does with stages that fail, and when its time is up; it needs no GPU for that."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_accuracy, gpu_check, gpu_stages, harness
from benchmarks.cases import Candidate, Case
from benchmarks.gpu_accuracy import backends, paper_ops
from benchmarks.gpu_check import Check
from benchmarks.harness import run_cases
from benchmarks.machine import ROOT
from benchmarks.results import result_of, write
from buildtools import plan
from tests.ops.table import attention_case


@pytest.mark.slow
def test_a_stage_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    check = Check("cpu", 2.0, tmp_path / "out", tmp_path)
    check.run({"accuracy_no_such_op": 60.0, "hot_path": 60.0}, at_once=1)
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert not report["accuracy_no_such_op"]["ok"]
    assert "no_such_op" in report["accuracy_no_such_op"]["error"]
    assert "no_such_op" in (tmp_path / "out" / "gpu_check.log").read_text()
    assert report["hot_path"]["ok"] and "GPU" in report["hot_path"]["skipped"]


def test_a_stage_that_hangs_is_stopped(tmp_path: Path) -> None:
    check = Check("cpu", 2.0, tmp_path / "out", tmp_path)
    running = check.start("environment", 60.0)
    assert running is not None
    check.finish(running)  # as when its time is up
    assert not check.report["environment"]["ok"]
    assert "stopped after" in check.report["environment"]["error"]
    assert running.process.returncode == -9


def test_no_stage_begins_when_time_is_up(tmp_path: Path) -> None:
    check = Check("cpu", 0.1, tmp_path / "out", tmp_path)
    check.run({"accuracy_memory_update": 60.0})
    check.run_benchmarks("ours", ["bench_a", "bench_b"])
    for stage in ("accuracy_memory_update", "ours"):
        assert check.report[stage]["skipped"] == "no time was left"


def test_the_benchmarks_after_a_crash_run_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check("cpu", 9.0, tmp_path / "out", tmp_path)
    runs = []

    def run(limits: dict[str, float], arguments: list[str]) -> None:
        (name,), names = limits, arguments[1:]
        runs.append((name, names))
        begun = {"ours": ["a", "b"], "ours_2": [], "ours_3": ["d"]}[name]  # b and c crash
        check.report[name] = {"ok": False, "begun": begun}

    monkeypatch.setattr(check, "run", run)
    check.run_benchmarks("ours", ["a", "b", "c", "d"])
    assert runs == [("ours", ["a", "b", "c", "d"]), ("ours_2", ["c", "d"]), ("ours_3", ["d"])]


def test_results_are_in_few_files_while_the_check_runs(tmp_path: Path) -> None:
    check = Check("cpu", 9.0, tmp_path / "out", tmp_path)
    check.pack()
    assert list(check.out.iterdir()) == []  # nothing to pack yet
    row = {"K": 19, "dtype": "bfloat16", "candidate": "ours", "median_ms": 0.5, "host_us": 80.0}
    row |= {"share_of_limit": 0.25, "limited_by": "copy", "times_ours": 1.0}
    result = result_of("toy", "cpu", ["K", "dtype"], [row])
    result["failures"] += ["ValueError: why"]
    write(result, check.results)
    check.keep("ours", {"ok": True}, 1.0)
    assert {p.name for p in check.out.iterdir()} == {
        *("gpu_check.json", "results.zip", "summary.txt")
    }
    lines = (check.out / "summary.txt").read_text().splitlines()
    assert lines[0] == "toy 19 bfloat16: 0.5 ms, host 80 us, 25% of copy; alone"
    assert lines[1] == "toy FAILED ValueError: why"
    with zipfile.ZipFile(check.out / "results.zip") as file:
        assert {Path(name).suffix for name in file.namelist()} == {".json", ".csv"}


def test_every_benchmark_has_its_turn() -> None:
    found = {p.stem for p in Path(gpu_check.__file__).parent.glob("bench_*.py")}
    listed = {*gpu_check.OPS, *gpu_check.WHOLE} - {"table7_contexts"}
    assert listed | gpu_check.OF_THE_HOST == found
    assert not listed & gpu_check.OF_THE_HOST


def test_the_stages_fit_into_one_loan() -> None:
    """With a CUDA part that was carried, which takes the time of loading it."""
    values = math.ceil(len(gpu_check.ACCURACY) / gpu_check.AT_ONCE)
    most = gpu_check.MACHINE["environment"] + gpu_check.FIRST["hot_path"]
    most += values * max(gpu_check.ACCURACY.values())
    seconds = most / 2  # these end by themselves, the others when their time is up
    seconds += sum(gpu_check.SPEED.values()) + gpu_check.KEPT_FOR_LAST
    assert gpu_check.MINUTES <= 9  # a command may take ten minutes
    assert seconds < 60 * gpu_check.MINUTES


def test_a_cuda_part_of_other_sources_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_stages, "ROOT", tmp_path)
    shutil.copytree(ROOT / "csrc" / "common", tmp_path / "csrc" / "common")
    record = tmp_path / "mcibi_fast" / "_build_record.json"
    assert gpu_stages.build("cpu", 9)["skipped"].endswith("there is none")
    record.parent.mkdir()
    part = {"built": True, "sources": plan.cuda_digest(tmp_path), "nvcc": "nvcc"}
    record.write_text(json.dumps({"cuda": part}))
    info = {"backends": {"cuda": "no CUDA device is visible"}, "cuda_archs": ["9.0"]}
    monkeypatch.setattr(gpu_stages, "shell", lambda *_, **__: json.dumps([info, None]))
    assert gpu_stages.build("cpu", 9)["how"] == "carried"
    (tmp_path / "csrc" / "common" / "labels.cuh").write_text("// another")
    assert "built from other sources" in gpu_stages.build("cpu", 9)["skipped"]


@pytest.mark.slow
@pytest.mark.parametrize("op", ["upsample_cross_entropy", "upsample_confusion"])
def test_every_comparison_is_reported(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, report = gpu_accuracy.compare(op, "cpu", 60)
    assert report["checked"] >= 9 and report["failed"] == report["left_out"] == 0
    # A wrong result fails, and the comparisons after it are made all the same.
    monkeypatch.setattr(gpu_accuracy, "_error", lambda *_: float("nan"))
    *_, wrong = gpu_accuracy.compare(op, "cpu", 60)
    assert wrong["failed"] == wrong["checked"] == report["checked"]


@pytest.mark.slow
def test_a_peer_that_fails_is_left_out_and_ours_must_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "plan", harness.Plan())
    harness.survive_failures(tmp_path)
    harness.time_briefly(0.05)
    one, zero = (lambda: torch.ones(3)), (lambda: torch.zeros(3))

    def broken() -> torch.Tensor:
        raise RuntimeError("does not run")

    def toy(**runs: Any) -> Case:
        return Case("toy", {}, torch.float32, [Candidate(n, r) for n, r in runs.items()], 4, 1)

    cases = [toy(reference=broken, eager=one, sdpa=zero, ours=one), toy(eager=one, ours=zero)]
    report = run_cases("toy", [lambda c=c: c for c in cases], "cpu", quick=True)
    assert [row["candidate"] for row in report["rows"]] == ["eager", "ours"]
    dropped = [line for line in report["failures"] if line.startswith(harness.DROPPED)]
    assert [line.split(": ")[3] for line in dropped] == ["reference", "sdpa"]
    assert report["failures"][-1].startswith("Disagreement: toy")  # ours
    harness.time_briefly(0.05, alone=True)
    other = [Candidate("two_passes", one, "cuda"), Candidate("ours", one, "cuda")]
    case = replace(cases[0], candidates=[*cases[0].candidates[:-1], *other])
    alone = run_cases("toy", [lambda: cases[0], lambda: case], "cpu", quick=True)
    assert alone["benchmark"] == "toy_alone" and alone["failures"] == []
    assert [row["candidate"] for row in alone["rows"]] == ["ours", "two_passes", "ours"]


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
    assert {f"accuracy_{name}" for name in paper_ops()} == set(gpu_check.ACCURACY)
