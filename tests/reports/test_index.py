"""The index of a folder of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mcibi_fast import cli
from mcibi_fast.recipes import ModelConfig, ScenesData, TrainConfig
from mcibi_fast.reports.curves import LINES
from mcibi_fast.reports.index import build_index, find_runs
from mcibi_fast.training.run import Run

pytestmark = pytest.mark.usefixtures("one_process")


def write_run(path: Path, mean_iou: float | None, model: str = "fcn") -> Path:
    """A run of three readings and, unless ``mean_iou`` is None, two evaluations; no weights."""
    path.mkdir(parents=True)
    config = TrainConfig(data=ScenesData(), model=ModelConfig.named(model, "test_resnet", {}))
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    run = Run(path)
    for step in (1, 2, 3):
        run.record(step=step, loss=2.0 / step, lr=0.1, losses={"loss_cls": 2.0 / step})
    for step, factor in ((2, 0.5), (3, 1.0)):
        if mean_iou is not None:
            scores = {"mean_iou": factor * mean_iou, "pixel_accuracy": 0.9, "classes": []}
            run.record(step=step, epoch=step, metrics=scores)
    return path


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in rows]


def test_runs_are_listed_best_first(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.25)
    write_run(tmp_path / "tables" / "b", 0.5, "fcn_mcibipp")
    write_run(tmp_path / "new", None)
    (tmp_path / "tables" / "b" / "report.html").write_text("a page")
    (tmp_path / "photos").mkdir()
    assert [path.name for path in find_runs(tmp_path)] == ["a", "new", "b"]
    page = build_index(tmp_path).html()
    rows = cells(page)
    assert rows[0][-2:] == ["mIoU", "pixel accuracy"]
    assert [(row[0], row[1], row[-2]) for row in rows[1:]] == [
        ("tables/b", "FCN + MCIBI++", "50.00"),
        ("a", "FCN", "25.00"),
        ("new", "FCN", "–"),
    ]
    assert rows[1][5] == "3"  # steps
    assert re.findall('href="([^"]+)"', page) == ["./tables/b/report.html"]
    assert page.count("data:image/png") == 1 and "http" not in page


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "good", 0.5)
    bad = write_run(tmp_path / "<b>bad", 0.5)
    (bad / "config.json").write_text('{"data": ')
    page = build_index(tmp_path).html()
    (row,) = [row for row in cells(page) if row[0].startswith("&lt;b&gt;bad")]
    assert "not JSON" in row[1] and "<b>" not in page


def test_many_runs(tmp_path: Path) -> None:
    """All are in the table; the curves are of as many as can be told apart."""
    for i in range(LINES + 2):
        write_run(tmp_path / f"run{i:02}", 0.01 * i)
    page = build_index(tmp_path).html()
    assert len(cells(page)) == LINES + 3
    assert f"The curves are of the {LINES} runs" in page


def test_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    write_run(tmp_path / "runs" / "a", 0.25)
    assert cli.main(["report", str(tmp_path / "runs")]) == 0
    assert capfd.readouterr().out == f"index: {tmp_path / 'runs' / 'index.html'}\n"
    assert "<title>Runs in runs</title>" in (tmp_path / "runs" / "index.html").read_text()
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "i.html")]) == 0
    assert (tmp_path / "i.html").is_file()
    assert "takes only --out" in fails("report", tmp_path / "runs", "--gallery", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "is not the directory of a run" in fails("report", tmp_path / "empty")
