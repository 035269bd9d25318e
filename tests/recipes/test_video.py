"""Recipes of video data: the paper's settings, clips as configured, a run from start to score."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mcibi_fast import cli, recipes
from mcibi_fast.data import DataError
from mcibi_fast.recipes import MovingScenesData, TrainConfig, VideoData
from mcibi_fast.recipes.registry import FREE_RECIPES, RECIPES, configure
from tests.data import trees


def test_vspws_settings() -> None:
    config = recipes.vspw()
    assert config.epochs * (2806 // config.batch_size) == 42_000
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.01, 5e-4)
    assert config.augmentation.crop_size == (512, 512) and config.augmentation.short_side == 512
    assert isinstance(config.data, VideoData) and config.data.train_frames == "one"


@pytest.mark.parametrize("recipe", [recipes.vspw, recipes.camvid_video, recipes.moving_scenes])
def test_configurations_survive_json(recipe) -> None:
    config = recipe()
    stored = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(stored) == config
    assert type(TrainConfig.from_dict(stored).data) is type(config.data)


def test_any_framework_and_backbone() -> None:
    for name in ("vspw", "camvid_video"):
        config = FREE_RECIPES[name]("fcn", "swin_tiny_patch4_window7_224", memory=False)
        assert config.model.name == "fcn" and config.model.options == {
            "output_stride": 32,
            "drop_path": 0.3,
        }
        assert config.optimizer.name == "adamw"
        assert RECIPES[name]().model.name == "upernet_mcibipp"
    assert recipes.vspw().optimizer.backbone_lr == 0.1


def test_bad_files_of_vspw(tmp_path: Path) -> None:
    root = trees.vspw(tmp_path)
    image = root / "VSPW_480p" / "data" / "1_a" / "origin" / "00000011.jpg"
    image.write_bytes(b"")
    whole = VideoData("vspw", str(root), train_frames="all")
    usable = replace(whole, bad="skip")
    with pytest.raises(DataError, match=r"00000011\.jpg: empty"):
        list(whole.dataset("train"))
    with pytest.warns(UserWarning, match="1 frames left out"):
        assert len(usable.dataset("train")) == len(whole.dataset("train")) - 1


def test_clips_as_configured(tmp_path: Path) -> None:
    root = str(trees.vspw(tmp_path))
    data = VideoData("vspw", root, short_side=24, history=3)
    train, val = data.dataset("train"), data.dataset("val")
    assert (len(train), len(val)) == (2, 2)
    assert len(VideoData("vspw", root, train_frames="all").dataset("train")) == 5
    sample = val[1]
    assert sample["image"].shape == (3, 24, 36) and sample["past"].shape == (3, 3, 24, 36)
    assert sample["label"].shape == trees.SIZE
    scenes = MovingScenesData(3, 2, (32, 32), length=5)
    assert (len(scenes.dataset("train")), len(scenes.dataset("val"))) == (3, 10)
    with pytest.raises(ValueError, match="no video dataset 'voc'"):
        VideoData("voc", root).dataset("train")
    with pytest.raises(ValueError, match=r"data\.root: this recipe reads a folder"):
        configure("vspw", None, [])


@pytest.mark.slow
def test_an_image_model_trains_on_frames(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    settings = [
        "model.options.feats_channels=8", "model.options.transform_channels=8",
        "data.train_count=4", "data.val_count=1", "data.length=3", "data.size=[32,32]",
        "augmentation.crop_size=[32,32]", "batch_size=2", "epochs=1", "workers=0", "device=cpu",
    ]  # fmt: skip
    assert cli.main(["train", "moving_scenes", "--out", out, "--quiet", "--set", *settings]) == 0
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").open()]
    assert any("metrics" in entry for entry in history)
    scores = str(tmp_path / "scores.json")
    assert cli.main(["evaluate", out, "--cpu", "--quiet", "--json", scores]) == 0
