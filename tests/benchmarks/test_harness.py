"""The benchmark harness: what it refuses, what it measures, what it writes."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import harness, machine
from benchmarks.cases import Candidate, Case, Disagreement, check
from benchmarks.harness import Later, command_line, run_cases
from benchmarks.machine import interleaved, peak_extra_memory


def case(*results: Tensor) -> Case:
    candidates = [Candidate(f"c{i}", lambda r=r: r) for i, r in enumerate(results)]
    return Case("toy", {"K": 3}, torch.float32, candidates, bytes=4, flops=1)


def test_refuses_results_that_disagree() -> None:
    right = torch.linspace(-1, 1, 7)
    check(case(right, right + 1e-6, right.clone()))
    wrong = right.clone()
    wrong[3] += 0.01
    for bad in (wrong, right[:-1], right / 0):
        with pytest.raises(Disagreement, match="toy: K 3, float32: c2"):
            check(case(right, right, bad))


def test_nothing_is_reported_when_a_case_disagrees(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Disagreement):
        run_cases("toy", [lambda: case(torch.ones(2), torch.zeros(2))], "cpu", quick=True)
    assert "ms" not in capsys.readouterr().out


def test_several_results_are_compared_one_by_one() -> None:
    right = [torch.ones(3), torch.linspace(0, 1, 5)]
    candidates = [Candidate("a", lambda: right), Candidate("b", lambda: [right[0], right[1] + 0.1])]
    with pytest.raises(Disagreement, match=r"b is 0\.1 away from a in result 1"):
        check(Case("toy", {}, torch.float32, candidates, 4, 1))


def test_the_euclidean_norm_forgives_single_entries() -> None:
    right = torch.ones(10_000)
    wrong = right.clone()
    wrong[0] = 1.5
    candidates = [Candidate("a", lambda: right), Candidate("b", lambda: wrong)]
    gradients = Case("toy", {}, torch.float32, candidates, 4, 1, tolerance=1e-2, euclidean=True)
    check(gradients)
    wrong[:10] = 1.5
    with pytest.raises(Disagreement, match=r"b is 0\.016 away"):
        check(gradients)


@pytest.mark.parametrize("euclidean", [False, True])
def test_zeros_are_met_exactly(euclidean: bool) -> None:
    """A gradient that is zero, such as that of a softmax over one value, has no relative error."""
    zeros = torch.zeros(3)
    exact, wrong = case(zeros, zeros.clone()), case(zeros, zeros + 1e-6)
    check(replace(exact, euclidean=euclidean))
    with pytest.raises(Disagreement, match="c1 is inf away"):
        check(replace(wrong, euclidean=euclidean))


def test_classes_may_differ_at_near_ties_alone() -> None:
    labels = torch.zeros(10_000, dtype=torch.int64)
    few, many = labels.clone(), labels.clone()
    few[:9], many[:11] = 7, 7
    check(case(labels, few))
    with pytest.raises(Disagreement, match=r"c1 is 0\.0011 away"):
        check(case(labels, many))


def test_with_a_truth_twice_the_first_error_is_allowed() -> None:
    truth = torch.linspace(1, 2, 9, dtype=torch.float64)

    def candidate(factor: float) -> Candidate:
        return Candidate(str(factor), lambda: (truth * (1 + factor)).bfloat16())

    def toy(*factors: float) -> Case:
        candidates = [candidate(f) for f in factors]
        return Case("toy", {}, torch.bfloat16, candidates, 4, 1, truth=lambda: truth)

    check(toy(0.02, 0.035))
    with pytest.raises(Disagreement, match=r"0\.06 is"):
        check(toy(0.02, 0.06))


@pytest.mark.slow
def test_parts_are_timed_but_not_compared() -> None:
    one, other = Candidate("a", lambda: torch.ones(2)), Candidate("part", lambda: torch.zeros(1))
    counted = Candidate("ours", lambda: torch.ones(2), counts=lambda: {"host_syncs": 7})
    whole = Case("toy", {}, torch.float32, [one, counted], 4, 1, parts=[other])
    rows = run_cases("toy", [lambda: whole], "cpu", quick=True)["rows"]
    assert [row["candidate"] for row in rows] == ["part", "a", "ours"]
    assert rows[0]["share_of_limit"] is None and rows[2]["host_syncs"] == 7
    assert rows[2]["times_ours"] == 1


def test_no_case_begins_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "plan", harness.Plan())
    harness.stop_after(-1)
    report = run_cases("toy", [lambda: case(torch.ones(2), torch.ones(2))] * 2, "cpu", quick=True)
    assert report["rows"] == [] and report["cases_left_out"] == 2


@pytest.mark.slow
def test_a_failed_case_may_be_listed_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "plan", harness.Plan())
    harness.survive_failures()
    wrong, right = case(torch.ones(2), torch.zeros(2)), case(torch.ones(2), torch.ones(2))
    report = run_cases("toy", [lambda: wrong, lambda: right], "cpu", quick=True)
    assert len(report["rows"]) == 2 and report["failures"][0].startswith("Disagreement: toy")


@pytest.mark.slow
def test_a_run_continues_with_the_cases_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = harness.Plan(resuming=True, folder=tmp_path, survive=True)
    monkeypatch.setattr(harness, "plan", plan)
    made = []

    def later(K: int) -> Later:
        whole = replace(case(torch.ones(2), torch.ones(2)), sizes={"K": K, "task": "train"})
        return Later(whole.sizes, lambda: made.append(K) or whole)

    run_cases("toy", [later(3)], "cpu", quick=True)
    plan.only = "4 train"
    report = run_cases("toy", [later(3), later(4), later(5)], "cpu", quick=True)
    assert made == [3, 4]
    assert [row["K"] for row in report["rows"]] == [3, 3, 4, 4]


def test_times_are_those_of_each_function() -> None:
    fast, slow = interleaved([lambda: time.sleep(0.001), lambda: time.sleep(0.02)], "cpu", 0.2)
    assert len(fast) >= 3 and len(slow) >= 3
    assert 0.001 <= min(fast) < 0.02 <= min(slow)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_memory_counts_results_and_temporaries() -> None:
    def two_at_once() -> Tensor:
        return torch.ones(4 * 2**20) + 1  # 16 MiB and 16 MiB

    peak_extra_memory(two_at_once, "cpu")  # code is paged in
    assert peak_extra_memory(lambda: torch.ones(4 * 2**20), "cpu") == pytest.approx(16, abs=2)
    assert peak_extra_memory(two_at_once, "cpu") == pytest.approx(32, abs=2)


def test_processor_time_leaves_out_waiting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "_clock", machine._clock)
    assert machine._cpu_seconds(lambda: time.sleep(0.05)) >= 0.05
    machine.count_processor_time()
    assert machine._cpu_seconds(lambda: time.sleep(0.05)) < 0.04
    threads = torch.get_num_threads()
    arguments = ["bench", "--device", "cpu", "--threads", "2", "--processor-time"]
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        with pytest.raises(SystemExit):
            command_line(lambda device, quick: [], "")
    finally:
        torch.set_num_threads(threads)
    assert "--processor-time: only with --threads 1" in capsys.readouterr().err


def test_a_later_case_can_be_a_key() -> None:
    """`pytest benchmarks/` keeps the last case by the function that makes it."""
    one, other = (Later({"K": 2}, lambda: pytest.fail("made")) for _ in range(2))
    assert {one: 1, other: 2}[one] == 1
