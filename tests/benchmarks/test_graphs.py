"""Calls timed as CUDA graphs, with a stand-in for the GPU that captures and replays on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import graphs, harness, machine
from benchmarks.cases import Candidate, Case
from benchmarks.gpu_check import summary
from benchmarks.harness import run_cases

RATES = {"copy_GB_s": 1.0, "matmul_GFLOP_s": 1.0}


class FakeGraph:
    """Runs the captured function again, into the tensors that it returned."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.run, self.result, self.replays = run, run().clone(), 0

    def replay(self) -> None:
        self.replays += 1
        self.result.copy_(self.run())


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """What `benchmarks.harness` and `benchmarks.graphs` use of CUDA; yields what was captured."""
    made: list[FakeGraph] = []

    def capture(candidate: Candidate) -> tuple[FakeGraph, list[Tensor]]:
        made.append(FakeGraph(candidate.run))
        return made[-1], [made[-1].result]

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "_warm", lambda candidate: [candidate.run().clone()])
    monkeypatch.setattr(machine, "_cuda_seconds", machine._cpu_seconds)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(harness, "limits", lambda *_: RATES)
    monkeypatch.setattr(harness, "result_of", lambda name, _: _result_of(name, "cpu"))
    monkeypatch.setattr(harness, "peak_extra_memory", lambda *_: None)
    monkeypatch.setattr(harness, "plan", harness.Plan(budget=0.01))
    return made


_result_of = harness.result_of


def toy(**runs: Callable[[], Any]) -> Case:
    return Case("toy", {"K": 3}, torch.float32, [Candidate(n, r) for n, r in runs.items()], 4, 1)


def test_short_calls_are_timed_as_graphs_too(
    fake_gpu: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = torch.ones(3)
    case = toy(eager=lambda: one + 0, ours=lambda: one * 1)
    result = run_cases("toy", [lambda: case], "cuda", quick=True)
    assert len(fake_gpu) == 2 and all(graph.replays > 10 for graph in fake_gpu)
    for row in result["rows"]:
        assert row["graph_ms"] > 0 and row["graph_host_us"] > 0 and "graph_left_out" not in row
    (line,) = summary([result])
    assert ", as a graph " in line and "(graphs " in line
    monkeypatch.setattr(graphs, "SHORT", 0.0)
    (long, _) = run_cases("toy", [lambda: case], "cuda", quick=True)["rows"]
    assert not any(column.startswith("graph") for column in long)


def test_a_candidate_that_cannot_be_captured_keeps_its_other_figures(
    fake_gpu: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose replay computes something else, such as a random number that it drew once."""
    capture = graphs.capture

    def fails(candidate: Candidate) -> Any:
        if candidate.name == "eager":
            raise RuntimeError("operation not permitted when stream is capturing")
        return capture(candidate)

    monkeypatch.setattr(graphs, "capture", fails)
    counts = itertools.count()
    one = torch.ones(3)
    case = toy(eager=lambda: one + 0, counted=lambda: one * next(counts), ours=lambda: one * 1)
    result = harness.measure(case, "cuda", RATES, quick=True)
    eager, counted, ours = result
    assert eager["graph_left_out"].startswith("RuntimeError: operation not permitted")
    assert counted["graph_left_out"].startswith("Disagreement: toy: K 3, float32: counted replayed")
    assert all(row["median_ms"] > 0 for row in result) and ours["graph_ms"] > 0
    assert "graph_ms" not in eager and "graph_ms" not in counted


def test_a_replay_that_writes_nothing_is_not_timed(
    fake_gpu: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGraph, "replay", lambda self: None)
    (column,) = graphs.columns(toy(ours=lambda: torch.ones(3)), "cuda")
    assert "ours replayed is 1 away from ours" in column["graph_left_out"]
