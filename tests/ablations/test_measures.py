"""What is measured on one trained model: stages, ground truth, another test set, attacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mcibi_fast import cli
from mcibi_fast.ablations import measures, runs
from tests.ablations.command import TINY, arguments, results, trained_run
from tests.data import trees


@pytest.mark.slow
def test_table_6_is_one_training_and_stages_change_the_prediction(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(arguments("6", tmp_path)) == 0
    assert trained == ["fcn_mcibipp-seed0"]
    rows = results(tmp_path, "6")["rows"]
    scores = [row["mean"] for row in rows]
    assert all(s["ms"] > 0 for s in scores) and "trade_off" not in scores[0]
    run = trained_run(tmp_path / "fcn_mcibipp-seed0")
    model, dataset = run.model(), run.validation()
    for stage in (1, 3):
        expected = runs.percent(run.evaluate(model, dataset, stages=stage).compute())
        assert {k: rows[stage - 1]["seeds"]["0"][k] for k in expected} == expected
    # What was measured is not measured again.
    monkeypatch.setattr(runs, "evaluate", None)
    assert cli.main(arguments("6", tmp_path)) == 0
    assert trained == ["fcn_mcibipp-seed0"]


def test_table_1_tests_one_model_by_the_ground_truth_as_well(
    tmp_path: Path, trained: list[str]
) -> None:
    assert cli.main(arguments("1", tmp_path, "--rows", "2,4")) == 0
    assert trained == ["fcn_mcibipp-seed0"]
    plain, oracle = (row["mean"] for row in results(tmp_path, "1")["rows"])
    assert plain["seconds"] == oracle["seconds"]
    run = trained_run(tmp_path / "fcn_mcibipp-seed0")
    model, labelled = run.model(), run.model(weights_from="labels")
    assert labelled.needs_labels and not model.needs_labels
    expected = model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in labelled.state_dict().items())
    sample = run.validation()[0]
    images, labels = sample["image"][None], sample["label"][None]
    with torch.no_grad():
        logits = [m(images, labels=labels).logits for m in (model, labelled)]
    assert not torch.allclose(*logits)


@pytest.mark.slow
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
    backbone = "backbone=test_resnet"  # not the recipe's, so it is named
    assert trained == [f"fcn-{backbone}-seed0", f"fcn_mcibipp-{backbone}-seed0"]
    rows = results(tmp_path / "out", "8")["rows"]
    assert [row["versus"] for row in rows] == 2 * ["FCN on LIP", "FCN on CIHP"]
    assert all("mIoU_without_10" in row["mean"] for row in rows)


@pytest.mark.slow
def test_augmentation_is_tested_under_attack(tmp_path: Path, trained: list[str]) -> None:
    command = arguments("augmentation", tmp_path)
    assert cli.main([*command, "adversarial.epsilon=8"]) == 0
    assert len(trained) == 3
    rows = results(tmp_path, "augmentation")["rows"]
    assert all({"mIoU", "attacked_mIoU", "seconds"} <= set(row["mean"]) for row in rows)
    assert all(row["paper"] == {} for row in rows)

    run = trained_run(tmp_path / "fcn_mcibipp-seed0")
    model, dataset = run.model(), run.validation()
    colours = {"mean": dataset.mean, "std": dataset.std}
    spared = measures.UnderAttack(model, epsilon=0.0, **colours)
    assert torch.equal(run.evaluate(spared, dataset).matrix, run.evaluate(model, dataset).matrix)
    batch = [dataset[i] for i in range(3)]
    images, labels = (torch.stack([s[k] for s in batch]) for k in ("image", "label"))
    attacked = measures.UnderAttack(model, epsilon=8.0, **colours)
    with torch.no_grad():
        before, after = (m(images, labels=labels).losses for m in (model, attacked))
    assert sum(after.values()) > sum(before.values())
