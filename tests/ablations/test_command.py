"""``mcibi-fast ablate``: a table end to end, stopped and started again, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mcibi_fast import cli
from mcibi_fast.ablations.paper import TABLES
from mcibi_fast.training.trainer import Trainer
from tests.ablations.command import SCENES, arguments, results

BALANCED = "loss.class_weights=balanced"


def test_tables_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ablate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(TABLES)
    assert max(map(len, lines)) <= 100


@pytest.mark.slow
def test_table_2_then_others_that_share_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: list[str]
) -> None:
    assert cli.main(arguments("2", tmp_path, "--rows", "FCN,3,4")) == 0
    printed = capsys.readouterr().out
    assert "2 weighted add   model.options.fusion=weighted_add" in printed
    assert "row 2/3 weighted add, seed 0" in printed
    assert "| 43.39 | +6.43 |" in re.sub(" +", " ", printed)
    kinds = ["fcn", "fcn_mcibipp-fusion=weighted_add", "fcn_mcibipp"]
    assert trained == [f"{kind}-seed0" for kind in kinds]

    # One more seed trains that seed alone; the same command once more nothing.
    trained.clear()
    more = arguments("2", tmp_path, "--rows", "1,4", "--seeds", "2")
    assert cli.main(more) == 0
    assert trained == ["fcn-seed1", "fcn_mcibipp-seed1"]
    found = results(tmp_path, "2")
    assert [row["row"] for row in found["rows"]] == ["FCN", "concatenation"]
    assert all(set(row["seeds"]) == {"0", "1"} for row in found["rows"])
    trained.clear()
    capsys.readouterr()
    assert cli.main(more) == 0
    assert trained == [] and results(tmp_path, "2") == found
    assert capsys.readouterr().out.count("already done") == 4

    # Another table trains only what it does not share.
    assert cli.main(arguments("5", tmp_path, "--rows", "0.2,0.4")) == 0
    assert trained == ["fcn_mcibipp-alpha=0.2-seed0"]

    # The scores and the environment are those of the runs.
    lines = (tmp_path / "fcn-seed1" / "history.jsonl").read_text().splitlines()
    metrics = next(json.loads(line)["metrics"] for line in lines if "metrics" in line)
    assert found["rows"][0]["seeds"]["1"]["mIoU"] == 100 * metrics["mean_iou"]
    environment = found["runs"]["fcn-seed1"]
    assert environment["threads"] == 1 and environment["torch"] == torch.__version__


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(
    tmp_path: Path,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    step = Trainer._train_step

    def interrupted_step(self: Trainer, batch: dict) -> None:
        step(self, batch)
        if "alpha" in self.run.path.name:
            os.kill(os.getpid(), signal.SIGINT)

    command = ["--rows", "0.4,0.6"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted_step)
        assert cli.main(arguments("5", stopped, *command)) == 130
    assert "stopped at row 2/2 0.6, seed 0; the same command" in capfd.readouterr().err
    assert [len(row["seeds"]) for row in results(stopped, "5")["rows"]] == [1, 0]

    trained.clear()
    assert cli.main(arguments("5", stopped, *command)) == 0
    assert trained == ["fcn_mcibipp-alpha=0.6-seed0 resumed"]
    assert cli.main(arguments("5", whole, *command)) == 0
    name = "fcn_mcibipp-alpha=0.6-seed0/checkpoints/last/model.safetensors"
    a, b = (safetensors.torch.load_file(out / name) for out in (stopped, whole))
    assert all(torch.equal(a[key], b[key]) for key in a | b)
    mine, theirs = (results(out, "5")["rows"][1]["mean"]["mIoU"] for out in (stopped, whole))
    assert mine == theirs


def test_a_run_of_another_configuration_is_left_alone(
    tmp_path: Path, fails: Callable[..., str], trained: list[str]
) -> None:
    assert cli.main(arguments("2", tmp_path, "--rows", "4")) == 0
    before = (tmp_path / "fcn_mcibipp-seed0" / "measured.json").read_bytes()
    message = fails(*arguments("2", tmp_path), "optimizer.lr=0.5")
    assert "fcn_mcibipp-seed0 holds a run with optimizer.lr 0.05, now it is 0.5" in message
    assert "loss.class_weights None" in fails(*arguments("2", tmp_path), BALANCED)
    assert trained == ["fcn_mcibipp-seed0"]
    assert (tmp_path / "fcn_mcibipp-seed0" / "measured.json").read_bytes() == before


def test_a_run_that_wrote_its_class_weights_down_is_found_again(
    tmp_path: Path, trained: list[str]
) -> None:
    for _ in range(2):
        assert cli.main([*arguments("2", tmp_path, "--rows", "4"), BALANCED]) == 0
    assert trained == ["fcn_mcibipp-seed0"]


def test_bad_input_is_one_line_before_anything_is_trained(
    tmp_path: Path, fails: Callable[..., str], trained: list[str]
) -> None:
    out = str(tmp_path / "out")
    tiny = ["--set", *SCENES]
    assert "no table '7'; there are 1, 2," in fails("ablate", "7")
    assert "--seeds" in fails("ablate", "2", "--seeds", "0")
    assert "--rows: no row 'x'" in fails("ablate", "2", "--rows", "x")
    assert "--data: no dataset 'city'" in fails("ablate", "2", "--data", "city")
    assert "--root" in fails("ablate", "2", "--data", "camvid", "--out", out)
    assert "--root" in fails("ablate", "2", "--root", str(tmp_path), *tiny)
    assert "give --data lip" in fails("ablate", "8", *tiny)
    assert "does not test on a second dataset" in fails(
        "ablate", "2", "--test-root", str(tmp_path), *tiny
    )
    assert "wdth" in fails("ablate", "2", "--out", out, *tiny, "model.options.wdth=1")
    assert "vary" in fails("ablate", "2", "--out", out, *tiny, "model.options.fusion=add")
    assert trained == [] and not Path(out).exists()


def test_runs_name_another_backbone(
    tmp_path: Path, fails: Callable[..., str], trained: list[str]
) -> None:
    """A run of an earlier version, which did not name it, is found if it is the same."""
    other = "model.backbone=test_efficientnet"
    command = [*arguments("2", tmp_path, "--rows", "1"), other]
    assert cli.main(command) == 0
    assert trained == ["fcn-backbone=test_efficientnet-seed0"]
    (tmp_path / trained[0]).rename(tmp_path / "fcn-seed0")  # as earlier versions called it
    for _ in range(2):
        assert cli.main(command) == 0
        assert trained == ["fcn-backbone=test_efficientnet-seed0"]
    assert list(results(tmp_path, "2")["runs"]) == ["fcn-seed0"]
    assert cli.main([*command, "optimizer.lr=0.02"]) == 0  # not the same: it gets its own
    assert trained == ["fcn-backbone=test_efficientnet-seed0"] * 2
    message = fails(*arguments("2", tmp_path, "--rows", "1"))
    assert "fcn-seed0 holds a run with model.backbone 'test_efficientnet', now it is" in message
