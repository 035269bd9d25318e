"""Trackers: TensorBoard, CSV, and accelerate's wandb (tried: 0.31.0) and mlflow (3.17.2)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mcibi_fast.recipes import TrainConfig
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.trackers import CSVLog, check_trackers, flat
from mcibi_fast.training.train import train
from tests.tiny_run import stopped_after_one_epoch


def resumed(config: TrainConfig, out: Path) -> None:
    """A run that is stopped after its first epoch, and goes on to its end."""
    seed_global_generators(7)
    stopped_after_one_epoch(config, out)
    train(config, out, resume=True, progress=False, report=str)


def rows(out: Path) -> list[str]:
    return (out / "scalars.csv").read_text().splitlines()


def test_rows_after_a_checkpoint_are_dropped(tmp_path: Path) -> None:
    log = CSVLog(tmp_path / "a.csv", step=0)
    for step in (2, 4, 6):
        log.add(step, {"loss": step / 2, "a,b": float("nan")}, "train/")
    assert (tmp_path / "a.csv").read_text().splitlines()[:3] == [
        "step,name,value", "2,train/loss,1.0", '2,"train/a,b",nan',
    ]  # fmt: skip
    again = CSVLog(tmp_path / "a.csv", step=4)
    assert [line[0] for line in (tmp_path / "a.csv").read_text().splitlines()] == [*"s2244"]
    again.add(6, {"loss": 9.0})
    assert (tmp_path / "a.csv").read_text().endswith("\n6,loss,9.0\n")
    CSVLog(tmp_path / "a.csv", step=0)  # a new run
    assert (tmp_path / "a.csv").read_text() == "step,name,value\n"


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers([])
    check_trackers(["tensorboard", "csv"])
    with pytest.raises(ValueError, match="no tracker 'tensorbord'; did you mean tensorboard"):
        check_trackers(["tensorbord"])
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError) as caught:
            check_trackers([name])
        assert str(caught.value).startswith(f"trackers: {name} needs {name}")
        assert 'pip install "mcibi-fast[trackers]"' in str(caught.value)


def test_fields_by_name(tiny_config: Callable[..., TrainConfig]) -> None:
    values = flat(tiny_config())
    assert values["optimizer.lr"] == 0.01 and values["model.options.form"] == "paper"
    assert values["augmentation.crop_size"] == "(32, 32)" and values["ema"] is None


@pytest.mark.slow
def test_csv_of_a_resumed_run(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = tiny_config('trackers=["csv"]')
    seed_global_generators(7)
    whole = train(config, tmp_path / "whole", progress=False, report=str).out
    resumed(config, tmp_path / "run")
    assert rows(tmp_path / "run") == rows(whole) and len(rows(whole)) > 10
    assert not (whole / "tensorboard").exists()
    history = [e for e in Run(whole).history() if "loss" in e]
    losses = [row.split(",") for row in rows(whole) if ",train/loss," in row]
    assert [(int(s), float(v)) for s, _, v in losses] == [(e["step"], e["loss"]) for e in history]
    assert any(",val/mean_iou," in row for row in rows(whole))


@pytest.mark.slow
def test_mlflow(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    config = tiny_config('trackers=["csv","mlflow"]')
    resumed(config, tmp_path / "run")
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'mcibi_fast'")
    (found,) = client.search_runs([experiment.experiment_id])  # one run, continued
    assert found.info.run_name == "run" and found.info.status == "FINISHED"
    assert found.data.params["optimizer.lr"] == "0.01"
    logged = {(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "train/loss")}
    written = [row.split(",") for row in rows(tmp_path / "run") if ",train/loss," in row]
    assert logged == {(int(step), float(value)) for step, _, value in written}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_offline(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both parts of a resumed run have one id; nothing of the weights depends on trackers."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = tiny_config('trackers=["wandb"]')
    resumed(config, tmp_path / "run")
    id = Run(tmp_path / "run").trackers()["wandb"]
    files = [*(tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")]
    assert len(files) == 2 and {file.name for file in files} == {f"run-{id}.wandb"}
    assert all(b"train/loss" in file.read_bytes() for file in files)
    seed_global_generators(7)
    plain = train(tiny_config(), tmp_path / "plain", progress=False, report=str).out
    ends = [Run(path).load_state()[0].read_bytes() for path in (plain, tmp_path / "run")]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_tracker_that_fails_does_not_end_a_run(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())

    def fail(*args, **options):
        raise OSError("no\nconnection")

    monkeypatch.setattr(mlflow, "log_metrics", fail)
    lines: list[str] = []
    config = tiny_config('trackers=["mlflow"]', "epochs=1")
    result = train(config, tmp_path / "run", progress=False, report=lines.append)
    assert result.steps == 3
    warning = (
        "warning: trackers: mlflow failed at step 2, the run goes on without it: no connection"
    )
    assert lines.count(warning) == 1
    monkeypatch.setattr(mlflow, "search_experiments", fail)
    with pytest.raises(ValueError, match="trackers: mlflow cannot start: no connection"):
        train(config, tmp_path / "other", progress=False, report=str)
