"""The demo: what its table and its verdict say, and that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcibi_fast import cli
from mcibi_fast.reports.demo import Outcome, Outcomes, mistaken, table_rows, text_table, verdict
from mcibi_fast.training.run import Run
from mcibi_fast.training.train import TrainResult


def outcomes(fcn: list[float], ours: list[float]) -> Outcomes:
    def outcome(value: float) -> Outcome:
        metrics = {"mean_iou": value, "pixel_accuracy": 0.5, "classes": []}
        matrix = torch.eye(12, dtype=torch.int64)
        matrix[0, 1] = 8  # of 16 pixels in pairs of look-alikes
        return Outcome(TrainResult(Path("run"), 10, 60.0, metrics, metrics), matrix)

    return {"FCN": [outcome(x) for x in fcn], "FCN + MCIBI++": [outcome(x) for x in ours]}


def test_table_has_mean_and_spread() -> None:
    rows = table_rows(outcomes([0.5, 0.6, 0.7], [0.25, 0.25, 0.25]))
    assert rows[0] == ["FCN", "60.00 ± 10.00", "50.00 ± 0.00", "50.00 ± 0.00", "60"]
    assert rows[1][1] == "25.00 ± 0.00"
    assert table_rows(outcomes([0.5], [0.75]))[1][1] == "75.00"
    lines = text_table(outcomes([0.5], [0.75])).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("fcn", "ours", "says"),
    [
        ([0.50], [0.49], "-1.00 points of mIoU. One seed"),
        ([0.50, 0.5], [0.52, 0.51], "+2.00, +1.00; mean +1.50. MCIBI++ is ahead with every seed"),
        ([0.50, 0.5], [0.48, 0.49], "-2.00, -1.00; mean -1.50. FCN is ahead with every seed"),
        ([0.50, 0.5], [0.56, 0.49], "+6.00, -1.00; mean +2.50. Seeds disagree: no clear"),
    ],
)
def test_verdict_says_who_is_ahead(fcn: list[float], ours: list[float], says: str) -> None:
    assert says in verdict(outcomes(fcn, ours))


def test_share_of_look_alikes_mistaken() -> None:
    matrix = torch.tensor([[6, 2, 2], [1, 9, 0], [0, 0, 50]])
    assert mistaken(matrix, [(0, 1)]) == pytest.approx(3 / 20)
    assert mistaken(matrix, [(0, 2)]) == pytest.approx(2 / 60)
    assert mistaken(matrix, [(0, 1), (0, 2)]) == pytest.approx(5 / 80)
    assert mistaken(torch.zeros(3, 3, dtype=torch.int64), [(0, 1)]) == 0


@pytest.mark.slow
def test_demo_runs_twice_in_one_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["epochs=1", "data.train_count=8", "data.val_count=7", "data.size=[40,48]"]
    settings += [
        "augmentation.crop_size=[32,32]",
        "device=cpu",
        "log_every=1",
        "batch_size=4",
        "workers=0",
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        arguments = ["demo", "--out", str(tmp_path), "--quiet", "--set", *settings]
        for _ in range(2):  # the second one replaces the first one's runs
            assert cli.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "FCN + MCIBI++" in printed and f"report: {tmp_path / 'report.html'}" in printed
    page = (tmp_path / "report.html").read_text()
    for heading in (
        "Look-alikes",
        "Predictions",
        "IoU per class",
        "Features",
        "What the pixels gather",
        "What the memory holds",
        "Training",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("data:image/png;base64") >= 7

    # The same schedule, data and seed for both.
    fcn, ours = (Run(tmp_path / f"{m}-seed0") for m in ("fcn", "fcn_mcibipp"))
    a, b = fcn.config(), ours.config()
    assert a.pop("model") != b.pop("model") and a == b
    rates = [[e["lr"] for e in run.history() if "lr" in e] for run in (fcn, ours)]
    assert rates[0] == rates[1] and len(rates[0]) == 2
