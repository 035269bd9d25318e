"""``evaluate`` of runs on videos: TC and VC besides mIoU; ``predict`` of such runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.data import CAMVID_CLASSES
from mcibi_fast.inference import evaluate_video
from mcibi_fast.inference.evaluate_video import evaluate_videos
from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.recipes import MovingScenesData

pytestmark = pytest.mark.usefixtures("one_process")
Fails = Callable[..., str]
DATA = MovingScenesData(train_count=2, val_count=2, size=(32, 40), length=10, history=2)
SETTINGS = (
    "model.backbone=test_resnet",
    "model.options.feats_channels=8",
    "model.options.transform_channels=8",
    "model.name=fcn_video_mcibipp",
    "data.history=2",
    "epochs=1",
    "batch_size=2",
    "device=cpu",
    "workers=0",
)


def train(recipe: str, out: Path, *settings: str, root: Path | None = None) -> Path:
    options = ["--root", str(root)] if root else []
    command = ["train", recipe, "--out", str(out), "--quiet", *options]
    with torch.random.fork_rng(devices=[]):
        assert cli.main([*command, "--set", *SETTINGS, *settings]) == 0
    return out


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a video model on moving scenes; tests only read it."""
    return train(
        "moving_scenes", tmp_path_factory.mktemp("scenes") / "run",
        "data.train_count=2", "data.val_count=2", "data.size=[32,40]", "data.length=10",
        "augmentation.crop_size=[32,32]",
    )  # fmt: skip


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a video model on CamVid's videos: a tree of three frames a split."""
    base, rng = tmp_path_factory.mktemp("camvid"), np.random.default_rng(0)
    for split in ("train", "val"):
        for kind, shape in (("images", (40, 48, 3)), ("labels", (40, 48))):
            folder = base / "data" / kind / split
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, len(CAMVID_CLASSES), shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"0001TP_{30 * i:06d}.png")
    crop = "augmentation.crop_size=[32,32]"
    return train("camvid_video", base / "run", crop, "batch_size=1", root=base / "data")


def scores(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    file = tmp_path / "scores.json"
    fixed = ["--cpu", "--quiet", "--workers", "0", "--json", str(file)]
    assert cli.main(["evaluate", *map(str, arguments), *fixed]) == 0
    return json.loads(file.read_text())


@pytest.mark.slow
def test_a_run_on_videos(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = scores(tmp_path, scenes)
    model, _ = load_model(scenes)
    expected = evaluate_videos(model, DATA.dataset("val"), flow="given").compute()
    assert found["videos"] == expected.as_dict()
    assert found["videos"]["tc_pairs"] == 18 and found["videos"]["vc8_windows"] == 4
    assert found["mean_iou"] == expected.frames.as_dict(model_classes(scenes))["mean_iou"]
    printed = capsys.readouterr().out
    assert printed.startswith("20 images of val; ")
    assert expected.table() in printed and "flow: exact" in printed

    strict = scores(tmp_path, scenes, "--protocol", "strict", "--flow", "none")["videos"]
    assert strict["protocol"] == "strict" and "tc" not in strict
    assert strict["vc8_windows"] == 6
    train = scores(tmp_path, scenes, "--split", "train", "--flow", "none")
    assert train["images"] == 20 and train["videos"]["vc8_windows"] == 4


def model_classes(run: Path) -> list[str]:
    return load_model(run)[1].classes


@pytest.mark.slow
def test_an_image_model_on_videos(tmp_path: Path, scenes: Path) -> None:
    settings = ["data.train_count=2", "data.val_count=1", "data.size=[32,40]", "data.length=9"]
    settings += ["augmentation.crop_size=[32,32]", "model.name=fcn_mcibipp", "data.history=0"]
    found = scores(tmp_path, train("moving_scenes", tmp_path / "run", *settings))
    assert found["videos"]["tc_pairs"] == 8 and found["videos"]["vc8"] is not None


@pytest.mark.slow
def test_flow(
    scenes: Path,
    camvid: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV (pip install mcibi-fast[video])")
    assert scores(tmp_path, scenes, "--flow", "dis")["videos"]["tc_flow"].startswith("DIS (OpenCV")
    assert scores(tmp_path, camvid, "--flow", "dis")["videos"]["tc_pairs"] == 2

    def nothing(*arguments: object) -> None:
        raise ValueError("neither RAFT nor DIS")

    monkeypatch.setattr(evaluate_video, "usual_flow", nothing)
    capsys.readouterr()
    assert "tc" not in scores(tmp_path, camvid)["videos"]
    assert capsys.readouterr().err == (
        "mcibi-fast: warning: TC is left out: neither RAFT nor DIS\n"
    )


@pytest.mark.slow
def test_bad_input(scenes: Path, camvid: Path, tmp_path: Path, fails: Fails) -> None:
    message = fails("evaluate", scenes, "--cpu", "--flow", "rfat")
    assert "--flow rfat: expected dis, raft, a file of its weights, or none" in message
    (tmp_path / "raft.pth").write_bytes(b"not weights")
    assert "raft.pth" in fails("evaluate", scenes, "--cpu", "--flow", tmp_path / "raft.pth")
    for option in (["--flow", "dis"], ["--protocol", "strict"]):
        message = fails("evaluate", scenes, "--cpu", "--root", camvid.parent / "data", *option)
        assert f"{option[0]}: for videos, which the data are not" in message


@pytest.mark.slow
def test_predict_of_a_run_on_camvids_videos(camvid: Path, tmp_path: Path, fails: Fails) -> None:
    source = camvid.parent / "data" / "images" / "val"
    shutil.copytree(source, tmp_path / "images")
    arguments = ["predict", camvid, tmp_path / "images", "--out", tmp_path / "out", "--cpu"]
    assert cli.main([*map(str, arguments), "--quiet", "--flip"]) == 0
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 3
    assert "of no published dataset" in fails(*arguments, "--submission")
