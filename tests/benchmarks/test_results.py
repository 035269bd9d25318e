"""The one format of results: what is committed has it, and nothing else is taken for a result."""

from __future__ import annotations

import argparse
import csv
import functools
import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_stages, results
from benchmarks.results import RESULTS, case_table, device_name, read, result_of, table, write

COMMITTED = read(RESULTS)


def test_every_committed_file_is_a_result() -> None:
    files = [path for path in RESULTS.rglob("*.json") if path.name != "gpu_check.json"]
    assert len(COMMITTED) == len(files) >= 12


@pytest.mark.parametrize("result", COMMITTED, ids=lambda r: f"{r['benchmark']}-{device_name(r)}")
def test_committed_results(result: results.Result, tmp_path: Path) -> None:
    (path,) = RESULTS.rglob(f"{result['benchmark']}-{device_name(result)}.json")
    again = write(result, tmp_path)
    for suffix in (".json", ".csv"):
        assert again.with_suffix(suffix).read_text() == path.with_suffix(suffix).read_text()
    assert {"device", "threads", "torch", "commit", "utc"} <= result["environment"].keys()
    assert all(row.keys() & set(result["keys"]) for row in result["rows"])
    cases = [tuple(row.get(k) for k in (*result["keys"], "candidate")) for row in result["rows"]]
    assert len(set(cases)) == len(cases) > 0  # keys and candidate tell all rows apart


def test_what_is_no_result_is_left_out(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    result = result_of("toy", "cpu", ["K"], [{"K": 3, "ms": 0.5}, {"K": 4, "ms": None, "more": 1}])
    path = write(result, tmp_path / "some" / "folder")
    (tmp_path / "other.json").write_text(json.dumps({"benchmark": "toy", "rows": []}))
    (tmp_path / "list.json").write_text("[]")
    assert read(tmp_path) == [result]
    with path.with_suffix(".csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["benchmark"], first["K"], first["ms"], first["more"]) == ("toy", "3", "0.5", "")
    assert (second["ms"], second["more"]) == ("", "1")


def test_tables_are_aligned() -> None:
    lines = table([{"name": "a", "ms": 1.5}, {"name": "long", "ms": None}], digits=2).splitlines()
    assert lines == ["name    ms", "a     1.50", "long     -"]
    rows = [row for row in COMMITTED[0]["rows"] if row["candidate"] in ("reference", "ours")][:2]
    text = case_table(rows).splitlines()
    assert len({len(line) for line in text[:-1]}) == 1 and text[-1].startswith("  limit ")


@pytest.mark.slow
def test_a_benchmark_as_a_stage_leaves_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import bench_context, harness

    monkeypatch.setattr(harness, "plan", harness.Plan())
    monkeypatch.setattr(harness, "time_briefly", lambda *_, **__: None)
    monkeypatch.setattr(harness, "stop_after", lambda _: None)  # or one case is all on the CPU
    small = functools.partial(bench_context.case, 5, 8, "paper", "forward", torch.float32, "cpu")
    monkeypatch.setattr(bench_context, "cases", lambda *_: [small, lambda: 1 / 0])
    options = argparse.Namespace(
        benchmarks=["bench_context"], results=tmp_path, result=tmp_path / "report" / "speed.json"
    )
    options.result.parent.mkdir()
    report = gpu_stages.speed("peers", "cpu", 60.0, options)
    (result,) = read(tmp_path)
    assert report["files"] == [path.name for path in tmp_path.glob("*.json")]
    assert report["failed"] == 1 and report["failures"] == result["failures"]
    assert [row["candidate"] for row in result["rows"]] == ["released", "general", "ours"]
