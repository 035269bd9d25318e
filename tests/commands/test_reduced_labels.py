"""Masks of 1..K from training to evaluation, by the option that lowers their labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mcibi_fast import cli
from mcibi_fast.commands.run_settings import evaluation_data
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec, pack_weights
from mcibi_fast.recipes import FolderData, HuggingFaceData, TrainConfig
from mcibi_fast.recipes.registry import configure
from mcibi_fast.recipes.sources import relocated
from tests.commands.folders import write_folder

SIZE = (32, 40)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two images of each split; half of a mask is 0, a quarter each 1 and 2."""
    mask = np.zeros(SIZE, np.uint8)
    mask[:, 20:30], mask[:, 30:] = 1, 2
    root = write_folder(tmp_path / "data", mask, mask * 100)
    (root / "classes.txt").write_text("roof\nroad\n")
    return root


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    spec = ModelSpec(
        "fcn", "test_resnet", {"feats_channels": 8}, ["roof", "road"], [[0, 0, 0], [9, 9, 9]],
        [0.5] * 3, [0.25] * 3,
    )  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(pack_weights(create_model(spec), spec))
    return tmp_path / "model.safetensors"


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_training_and_evaluation(data: Path, tmp_path: Path, capsys) -> None:
    run, settings = tmp_path / "run", (
        "model.backbone=test_resnet", "model.options.feats_channels=8",
        "model.options.transform_channels=8", "epochs=1", "batch_size=2", "device=cpu",
        "workers=0", "augmentation.crop_size=[32,32]",
    )  # fmt: skip
    command = ["train", "folder", "--root", str(data), "--out", str(run), "--quiet", "--set"]
    assert cli.main([*command, *settings, "data.reduce_labels=true"]) == 0
    assert json.loads((run / "config.json").read_text())["data"]["reduce_labels"] is True
    scores = tmp_path / "scores.json"
    file = run / "checkpoints" / "best" / "model.safetensors"
    moved = shutil.copy(file, tmp_path / "moved.safetensors")  # of no run
    for arguments in ([run], [moved, "--root", data, "--reduce-labels"]):
        capsys.readouterr()
        options = ["--cpu", "--quiet", "--json", str(scores)]
        assert cli.main(["evaluate", *map(str, arguments), *options]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        shares = {row[0]: row[-1] for row in rows if row}
        assert shares["roof"] == shares["road"] == "50.00%"  # of the pixels with a class
        assert json.loads(scores.read_text())["data"]["reduce_labels"] is True
    assert cli.main(["evaluate", str(moved), "--root", str(data), "--cpu", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "label 2 with 2 classes" in error and "--reduce-labels with data check" in error


def test_evaluation_data(data: Path, weights: Path) -> None:
    """Another root keeps the run's way to read masks."""
    run = configure("folder", str(data), ["data.reduce_labels=true"])
    for trained, given in ((run, None), (None, True)):
        found = evaluation_data(weights, trained, None, str(data), reduce_labels=given)
        assert isinstance(found, FolderData) and found.reduce_labels
        assert np.unique(found.dataset("val").read(0)[1]).tolist() == [0, 1, 255]
    moved = relocated(run.data, f"{data}/.")  # as reports do it
    assert isinstance(moved, FolderData) and moved.reduce_labels
    for trained, name in ((None, None), (run, "camvid")):
        found = evaluation_data(weights, trained, name, str(data))
        assert isinstance(found, FolderData) and not found.reduce_labels
    for given in (None, False, True):
        found = evaluation_data(weights, None, "huggingface", "x", reduce_labels=given)
        assert isinstance(found, HuggingFaceData) and found.reduce_labels is bool(given)
    for name in ("lip", "coco"):
        with pytest.raises(ValueError, match="--reduce-labels: for the masks of a folder or of hu"):
            evaluation_data(weights, None, name, str(data), reduce_labels=True)
    for option in ({"reduce_labels": False}, {"binary": True}):  # what is said here comes first
        other = evaluation_data(weights, run, None, str(data), **option)
        assert isinstance(other, FolderData) and not other.reduce_labels
        assert other.binary is ("binary" in option)
    both = evaluation_data(weights, run, None, str(data), binary=True, reduce_labels=True)
    with pytest.raises(ValueError, match="binary and reduce_labels: give one of them"):
        both.dataset("val")


def test_runs_of_earlier_versions(data: Path) -> None:
    stored = configure("folder", str(data), []).to_dict()
    del stored["data"]["reduce_labels"]
    found = TrainConfig.from_dict(stored).data
    assert isinstance(found, FolderData) and found.reduce_labels is False
