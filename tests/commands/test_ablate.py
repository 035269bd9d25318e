"""``mcibi-fast ablate``: tables end to end, stopped and started again, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mcibi_fast import cli
from mcibi_fast.ablations import measures, runs
from mcibi_fast.ablations.paper import TABLES
from mcibi_fast.engine.train import Trainer
from mcibi_fast.metrics import ConfusionMatrix
from tests.data import trees

TINY = [
    "model.options.feats_channels=8",
    "model.options.transform_channels=8",
    "epochs=1",
    "batch_size=4",
    "augmentation.crop_size=[32,32]",
    "device=cpu",
    "workers=0",
    "log_every=1",
]
SCENES = [*TINY, "data.train_count=8", "data.val_count=3", "data.size=[40,48]"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from accelerate.state import AcceleratorState

    monkeypatch.delenv("MCIBI_FAST_DEBUG", raising=False)
    AcceleratorState._reset_state(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)


def arguments(table: str, out: Path, *more: str) -> list[str]:
    return ["ablate", table, "--out", str(out), "--quiet", *more, "--set", *SCENES]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that training was called for."""
    names: list[str] = []
    train = runs.train

    def noted(config: object, out: Path, **options: object) -> object:
        names.append(out.name + (" resumed" if options["resume"] else ""))
        return train(config, out, **options)

    monkeypatch.setattr(runs, "train", noted)
    return names


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with exit status 2 and one line; returns the line."""

    def run(*command: str) -> str:
        capfd.readouterr()
        assert cli.main(list(command)) == 2
        err = capfd.readouterr().err
        assert err.startswith("mcibi-fast: error: ") and err.count("\n") == 1, err
        return err

    return run


def results(out: Path, table: str) -> dict:
    return json.loads((out / f"table-{table}" / "results.json").read_text())


def test_tables_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ablate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(TABLES)
    assert max(map(len, lines)) <= 100


def test_table_2_then_others_that_share_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: list[str]
) -> None:
    assert cli.main(arguments("2", tmp_path, "--seeds", "2")) == 0
    printed = capsys.readouterr().out
    assert "3 weighted add   model.options.fusion=weighted_add" in printed
    assert "row 2/4 add, seed 1" in printed and "| 43.39 | +6.43 |" in re.sub(" +", " ", printed)
    kinds = ["fcn", "fcn_mcibipp-fusion=add", "fcn_mcibipp-fusion=weighted_add", "fcn_mcibipp"]
    assert trained == [f"{kind}-seed{seed}" for seed in (0, 1) for kind in kinds]

    found = results(tmp_path, "2")
    assert [row["row"] for row in found["rows"]] == ["FCN", "add", "weighted add", "concatenation"]
    assert all(set(row["seeds"]) == {"0", "1"} for row in found["rows"])
    environment = found["runs"]["fcn-seed1"]
    assert environment["threads"] == 1 and environment["torch"] == torch.__version__
    # The scores are those of the runs.
    lines = (tmp_path / "fcn-seed1" / "history.jsonl").read_text().splitlines()
    metrics = json.loads(lines[-1])["metrics"]
    assert found["rows"][0]["seeds"]["1"]["mIoU"] == 100 * metrics["mean_iou"]

    # The same command trains nothing; another table only what it does not share.
    trained.clear()
    assert cli.main(arguments("2", tmp_path, "--seeds", "2")) == 0
    assert trained == [] and results(tmp_path, "2") == found
    assert capsys.readouterr().out.count("there already") == 8
    assert cli.main(arguments("5", tmp_path, "--rows", "0.2,0.4")) == 0
    assert trained == ["fcn_mcibipp-alpha=0.2-seed0"]


def test_table_6_is_one_training_and_stages_change_the_prediction(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(arguments("6", tmp_path)) == 0
    assert trained == ["fcn_mcibipp-seed0"]
    rows = results(tmp_path, "6")["rows"]
    scores = [row["mean"] for row in rows]
    assert all(s["ms"] > 0 for s in scores) and "trade_off" not in scores[0]
    run = runs.TrainedRun(config_of(tmp_path / "fcn_mcibipp-seed0"), tmp_path / "fcn_mcibipp-seed0")
    model, dataset = run.model(), run.validation()
    for stage in (1, 3):
        model.head.stages = stage
        expected = measures.percent(run.evaluate(model, dataset))
        assert {k: rows[stage - 1]["seeds"]["0"][k] for k in expected} == expected
    # What was measured is not measured again.
    monkeypatch.setattr(runs, "evaluate", None)
    assert cli.main(arguments("6", tmp_path)) == 0
    assert trained == ["fcn_mcibipp-seed0"]


def config_of(folder: Path) -> runs.TrainConfig:
    return runs.TrainConfig.from_dict(json.loads((folder / "config.json").read_text()))


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


def test_table_8(tmp_path: Path, trained: list[str], fails: Callable[..., str]) -> None:
    lip, cihp = trees.lip(tmp_path / "lip"), trees.cihp(tmp_path / "cihp")
    command = ["ablate", "8", "--out", str(tmp_path / "out"), "--quiet", "--rows", "1,2,5,6"]
    command += ["--data", "lip", "--root", str(lip)]
    settings = ["model.backbone=test_resnet", "batch_size=2", "data.size=[32,32]"]
    settings += ["augmentation.size=[40,40]", *(s for s in TINY if "batch" not in s)]
    assert "--test-root DIR" in fails(*command, "--set", *settings)
    wrong = [*command, "--test-root", str(lip), "--set", *settings]
    assert "no Validation/Images in it" in fails(*wrong)
    assert trained == []
    assert cli.main([*command, "--test-root", str(cihp), "--set", *settings]) == 0
    assert trained == ["fcn-seed0", "fcn_mcibipp-seed0"]
    rows = results(tmp_path / "out", "8")["rows"]
    assert [row["versus"] for row in rows] == 2 * ["FCN on LIP", "FCN on CIHP"]
    assert all("mIoU_without_10" in row["mean"] for row in rows)


def test_without_class_10() -> None:
    confusion = ConfusionMatrix(3)
    confusion.matrix = torch.tensor([[6, 2, 2], [0, 8, 2], [5, 3, 2]])
    # Of class 2 no pixel counts; what was taken for it still is wrong.
    expected = (6 / 10 + 8 / 12) / 2
    assert measures.without_class(confusion, 2) == pytest.approx(expected)
    assert confusion.matrix[2].sum() == 10


def test_bad_input_is_one_line_before_anything_is_trained(
    tmp_path: Path, fails: Callable[..., str], trained: list[str]
) -> None:
    out = str(tmp_path / "out")
    tiny = ["--set", *SCENES]
    assert "no table '7'; there are 2," in fails("ablate", "7")
    assert "--seeds" in fails("ablate", "2", "--seeds", "0")
    assert "--rows: no row 'x'" in fails("ablate", "2", "--rows", "x")
    assert "--data: no dataset 'city'" in fails("ablate", "2", "--data", "city")
    assert "--root" in fails("ablate", "2", "--data", "camvid", "--out", out)
    assert "--root" in fails("ablate", "2", "--root", str(tmp_path), *tiny)
    assert "give --data lip" in fails("ablate", "8", *tiny)
    assert "no second dataset" in fails("ablate", "2", "--test-root", str(tmp_path), *tiny)
    assert "wdth" in fails("ablate", "2", "--out", out, *tiny, "model.options.wdth=1")
    assert "vary" in fails("ablate", "2", "--out", out, *tiny, "model.options.fusion=add")
    assert trained == [] and not Path(out).exists()


def test_a_run_of_another_configuration_is_left_alone(
    tmp_path: Path, fails: Callable[..., str], trained: list[str]
) -> None:
    assert cli.main(arguments("2", tmp_path, "--rows", "4")) == 0
    before = (tmp_path / "fcn_mcibipp-seed0" / "measured.json").read_bytes()
    message = fails(*arguments("2", tmp_path), "optimizer.lr=0.5")
    assert "fcn_mcibipp-seed0 holds a run with optimizer.lr 0.05, now it is 0.5" in message
    assert trained == ["fcn_mcibipp-seed0"]
    assert (tmp_path / "fcn_mcibipp-seed0" / "measured.json").read_bytes() == before
