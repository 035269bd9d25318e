"""Masks of 0 and 255 from training to evaluation, by the option that maps them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mcibi_fast import cli
from mcibi_fast.commands.run_settings import evaluation_data
from mcibi_fast.models.checkpoint import create_model
from mcibi_fast.models.weights import ModelSpec, pack_weights
from mcibi_fast.recipes import FolderData
from mcibi_fast.recipes.registry import configure
from tests.commands.folders import write_folder

pytestmark = pytest.mark.usefixtures("one_process")
SIZE = (32, 40)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two images of each split, half of whose masks is 255."""
    mask = np.zeros(SIZE, np.uint8)
    mask[:, 20:] = 255
    return write_folder(tmp_path / "data", mask, mask)


@pytest.mark.slow
def test_training_and_evaluation(data: Path, tmp_path: Path, capsys) -> None:
    run, settings = tmp_path / "run", (
        "model.backbone=test_resnet", "model.options.feats_channels=8",
        "model.options.transform_channels=8", "epochs=1", "batch_size=2", "device=cpu",
        "workers=0", "augmentation.crop_size=[32,32]",
    )  # fmt: skip
    command = ["train", "folder", "--root", str(data), "--out", str(run), "--quiet", "--set"]
    assert cli.main([*command, *settings]) == 2  # one class
    assert "--set data.binary=true" in capsys.readouterr().err
    assert cli.main([*command, *settings, "data.binary=true"]) == 0
    weights = run / "checkpoints" / "best" / "model.safetensors"
    assert json.loads((run / "config.json").read_text())["data"]["binary"] is True
    for arguments in ([run], [run, "--root", data], [weights, "--root", data, "--binary"]):
        capsys.readouterr()
        assert cli.main(["evaluate", *map(str, arguments), "--cpu", "--quiet"]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert next(row for row in rows if row[0] == "foreground")[-1] == "50.00%"


def test_evaluation_data(data: Path, tmp_path: Path) -> None:
    """Another root keeps the run's way to read masks."""
    spec = ModelSpec(
        "fcn", "test_resnet", {"feats_channels": 8}, ["background", "foreground"],
        [[0, 0, 0], [9, 9, 9]], [0.5] * 3, [0.25] * 3,
    )  # fmt: skip
    file = tmp_path / "model.safetensors"
    file.write_bytes(pack_weights(create_model(spec), spec))
    run = configure("folder", str(data), ["data.binary=true"])
    for trained, binary in ((run, None), (None, True)):
        found = evaluation_data(file, trained, None, str(data), binary=binary)
        assert isinstance(found, FolderData) and found.binary
        assert np.unique(found.dataset("val").read(0)[1]).tolist() == [0, 1]
    assert not evaluation_data(file, None, None, str(data)).binary
    assert not evaluation_data(file, run, None, str(data), binary=False).binary
    other = evaluation_data(file, run, None, str(data), reduce_labels=True)
    assert isinstance(other, FolderData) and other.reduce_labels and not other.binary
    with pytest.raises(ValueError, match="--binary: for the masks of a folder"):
        evaluation_data(file, None, "lip", str(data), binary=True)
