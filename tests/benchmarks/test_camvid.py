"""The page with what training on CamVid gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import camvid
from mcibi_fast import models
from mcibi_fast.recipes import ScenesData

CODES = ("matched by C_dl", "matched by class means", "chance")


def scores(iou: float) -> dict:
    names = ("mean_iou", "mean_iou_present", "pixel_accuracy", "mean_class_accuracy")
    row = {"class": "sky", "iou": iou, "accuracy": iou, "pixels": 9}
    metrics = dict.fromkeys(names, iou) | {"classes": [row]}
    return {"val": metrics, "test": metrics, "codes": dict.fromkeys(CODES, 100 * iou)}


def test_the_page_has_means_over_seeds_and_no_paths_of_the_machine(tmp_path: Path) -> None:
    for name, iou in (("fcn-seed0", 0.5), ("fcn-seed1", 0.6), ("fcn_mcibipp-seed0", 0.7)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "measured.json").write_text(json.dumps({"training": {}}))
        (folder / "scores.json").write_text(json.dumps(scores(iou)))
        (folder / "config.json").write_text(json.dumps({"data": {"root": str(tmp_path)}}))
        entry = {"step": 9, "epoch": 5, "metrics": scores(iou)["val"]}
        (folder / "history.jsonl").write_text(json.dumps(entry) + "\n")
    (tmp_path / "runs" / "unfinished").mkdir()
    (tmp_path / "runs" / "unfinished" / "measured.json").write_text("{}")
    for _ in range(2):  # the second time, what stands around the tables stays
        camvid.write(tmp_path / "runs", tmp_path / "docs")
        file = tmp_path / "docs" / "camvid.md"
        file.write_text("Why.\n" + file.read_text() + "So.\n")
    page = file.read_text()
    assert page.startswith("Why.\nWhy.\n# CamVid") and page.endswith("So.\nSo.\n")
    assert page.count("| fcn | 2 |") == 1
    assert "| fcn | 2 | 55.00 ± 7.07 | - | 55.00 ± 7.07 |" in page
    assert "| fcn_mcibipp | 1 | 70.00 |" in page and "unfinished" not in page
    assert "| sky | 55.0 | 70.0 |" in page
    kept = tmp_path / "docs" / "camvid" / "fcn-seed0"
    assert sorted(file.name for file in kept.iterdir()) == [
        "config.json",
        "history.jsonl",
        "measured.json",
        "scores.json",
    ]
    assert str(tmp_path) not in (kept / "config.json").read_text()
    assert (tmp_path / "docs" / "camvid_curves.png").stat().st_size > 1000


def test_codes_that_are_the_class_means_match_and_random_ones_do_not() -> None:
    data = ScenesData(train_count=4, val_count=6, size=(64, 64)).dataset("val")
    model = models.create(
        "fcn", data.num_classes, "test_resnet", memory="mcibi", feats_channels=16
    ).eval()
    found = camvid.collect(model, data, range(len(data)))
    R, classes = torch.from_numpy(found.R), torch.from_numpy(found.classes)
    means = torch.stack([R[classes == k].mean(0) for k in range(data.num_classes)])
    model.memory.memory.copy_(means[:, None].nan_to_num())
    result = camvid.codes(model, data)
    assert result["matched by C_dl"] == pytest.approx(result["matched by class means"])
    model.memory.memory.copy_(-means[:, None].nan_to_num())
    assert camvid.codes(model, data)["matched by C_dl"] < result["matched by class means"]
