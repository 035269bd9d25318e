"""The table of methods: all rows are measured, and all losses are the fused one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, table15_methods
from benchmarks.cases import Disagreement
from benchmarks.results import read, result_of, write
from mcibi_fast import cli, models
from mcibi_fast.ablations.paper import TABLES


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return table15_methods.build("test_resnet", 16, "cpu")


def test_rows_are_those_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(table15_methods.METHODS) == [row.name for row in TABLES["15"].rows]
    assert table15_methods.METHODS["UperNet+MCIBI++"] == "upernet_mcibipp"
    assert cli.main(["bench"]) == 0
    assert "table15" in capsys.readouterr().out.split()


def test_counts_are_those_of_the_whole_model() -> None:
    """As `mcibi-fast models` prints them, in millions and billions."""
    found = table15_methods.counts("PSPNet", "resnet101", 512, 512)
    assert (round(found.parameters / 1e6, 1), round(found.true / 1e9, 1)) == (70.3, 254.7)
    # FCN has the two convolutions of the authors' package, not one: decoders of 11.8 and 23.1 M.
    fcn = table15_methods.counts("FCN", "resnet101", 512, 512)
    assert found.parameters - fcn.parameters == 23_084_565 - 11_809_301


def test_every_loss_is_fused(made: dict[str, Any]) -> None:
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(21, (2, 32, 32))
    backbones = {id(model.backbone) for model in made.values()}
    assert len(made) == 22 and len(backbones) == 1
    for name, model in made.items():
        with torch.profiler.profile() as profile:
            loss, *grads = table15_methods.train(model, images, labels)
        assert loss.isfinite() and len(grads) > 10
        called = {event.key for event in profile.key_averages()}
        assert any("upsample_cross_entropy" in key for key in called), name
        assert not any("nll_loss" in key for key in called), name
        labels_found = table15_methods.infer(model, images[:1])
        assert labels_found.shape == (1, 32, 32)


def test_wrong_logits_are_refused(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    table15_methods.agreement("FCN", made["FCN"], "cpu", size=32)
    other = models.create("fcn", 21, "test_resnet", feats_channels=16)
    monkeypatch.setattr(cases.copy, "deepcopy", lambda model: other)
    with pytest.raises(Disagreement, match="FCN: image 32"):
        table15_methods.agreement("FCN", made["FCN"], "cpu", size=32)


@pytest.mark.slow
def test_the_benchmark_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {name: table15_methods.METHODS[name] for name in ("FCN", "PointRend", "EMANet")}
    monkeypatch.setattr(table15_methods, "METHODS", few)
    monkeypatch.setattr(table15_methods, "count_processor_time", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    command = ["table15", "--quick", "--device", "cpu", "--budget", "0.1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert table15_methods.main() == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in few)
    (result,) = read(tmp_path)
    assert [row["method"] for row in result["rows"]] == list(few)
    for row in result["rows"]:
        assert all(row[f"{task}_ms"] > 0 for task in ("train", "inference"))
        assert row["params_M"] > 0 and row["true_G"] > 0
        assert row["train_calls"] >= 1 and row["inference_calls"] >= 1
    first = result["rows"][0]
    assert first["train_times_FCN"] == first["inference_times_FCN"] == 1

    # An interrupted run goes on; a finished one, or one of other settings, begins again.
    kept = result["rows"][:2]
    write({**result, "rows": kept}, tmp_path)
    assert table15_methods.main() == 0
    assert "goes on after 2 of 3 methods" in capsys.readouterr().out
    (result,) = read(tmp_path)
    assert [row["method"] for row in result["rows"]] == list(few) and result["rows"][:2] == kept
    fresh = result_of("table15_methods", "cpu", ("method", "backbone", "size"))
    assert table15_methods.begun(fresh, tmp_path, "test_resnet", 64) is fresh
    write({**result, "rows": kept}, tmp_path)
    assert table15_methods.begun(fresh, tmp_path, "test_resnet", 64)["rows"] == kept
    for other in (("resnet18", 64), ("test_resnet", 96)):
        assert table15_methods.begun(fresh, tmp_path, *other) is fresh
