"""A run on shards is the run on the dataset that was packed, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from mcibi_fast import cli
from mcibi_fast.data import pack
from mcibi_fast.recipes import FolderData, NamedData, ScenesData, ShardsData, TrainConfig
from mcibi_fast.recipes.registry import configure
from mcibi_fast.training.run import Run
from mcibi_fast.training.state import seed_global_generators
from mcibi_fast.training.train import TrainResult, train
from mcibi_fast.training.trainer import Trainer

pytest.importorskip("webdataset", reason="needs webdataset to write shards")

MakeConfig = Callable[..., TrainConfig]


def run(config: TrainConfig, out: Path, *, resume: bool = False) -> TrainResult:
    # On resuming, the seed must not matter: the states come from the checkpoint.
    seed_global_generators(99 if resume else 7)
    return train(config, out, resume=resume, progress=False, report=lambda line: None)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Run(out).load_state()[0])


def assert_same_run(out: Path, expected: Path) -> None:
    got, wanted = weights(out), weights(expected)
    assert got.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(got[name], wanted[name])]
    assert Run(out).history() == Run(expected).history()


def write_folder(root: Path) -> Path:
    """JPEG images of three classes: five of train, three of val."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 5, "val": 3}.items():
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            label = rng.integers(3, size=(5, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            image = (label[..., None] * 70 + rng.integers(40, size=(40, 48, 3))).astype(np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(label).save(root / "labels" / split / f"{i}.png")
    (root / "classes.txt").write_text("a\nb\nc\n")
    return root


def pack_all(config: TrainConfig, root: Path) -> TrainConfig:
    """The same run on shards; several, and no split's samples fill the last."""
    for split in ("train", "val"):
        done = pack(config.data.dataset(split), root, split, shard_bytes=2_500, progress=False)
        assert done.shards > 1
    return dataclasses.replace(config, data=ShardsData(str(root)))


@pytest.mark.slow
def test_two_steps_on_a_packed_folder(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config("epochs=1", "batch_size=2")
    config.data = FolderData(str(write_folder(tmp_path / "folder")))
    packed = pack_all(config, tmp_path / "shards")
    assert run(config, tmp_path / "expected").steps == 2
    result = run(packed, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "expected")
    assert result.metrics["mean_iou"] is not None
    assert TrainConfig.from_dict(Run(tmp_path / "run").config()) == packed


@pytest.mark.slow
def test_packed_scenes_with_workers_stopped_and_resumed(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    packed = pack_all(config, tmp_path / "shards")
    run(config, tmp_path / "expected")

    packed.workers = 2
    step = Trainer._train_step

    def stopping_step(self: Trainer, batch: dict) -> None:
        if self.step == 4:
            raise RuntimeError("stopped")
        step(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train_step", stopping_step)
        with pytest.raises(RuntimeError, match="stopped"):
            run(packed, tmp_path / "run")
    assert Run(tmp_path / "run").load_state()[1]["step"] == 4  # in the midst of the second epoch
    run(packed, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "expected")


@pytest.mark.slow
def test_the_command_line_takes_shards_for_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "folder")
    shards = str(tmp_path / "shards")
    assert cli.main(["data", "pack", str(folder), shards, "--workers", "0"]) == 0
    settings = ["model.backbone=test_resnet", "model.options.feats_channels=8", "epochs=1"]
    settings += ["model.options.transform_channels=8", "batch_size=2", "device=cpu", "workers=0"]
    settings += ["augmentation.crop_size=[32,32]"]
    out = str(tmp_path / "run")
    command = ["train", "folder", "--root", shards, "--out", out, "--quiet", "--set", *settings]
    assert cli.main(command) == 0
    capsys.readouterr()
    tables = []
    for root in ([], ["--root", shards], ["--root", str(folder)]):
        assert cli.main(["evaluate", out, "--cpu", "--workers", "0", "--quiet", *root]) == 0
        tables.append(capsys.readouterr().out)
    assert "mIoU" in tables[0] and tables[0] == tables[1] == tables[2]


def test_a_published_recipe_on_shards_keeps_its_settings(tmp_path: Path) -> None:
    (tmp_path / "trainaug").mkdir()
    (tmp_path / "trainaug" / "index.json").write_text('{"format": "mcibi_fast shards 1"}')
    config = configure("voc", str(tmp_path), ["data.cache=/scratch", "epochs=1"])
    assert config.data == ShardsData(
        str(tmp_path), "trainaug", "val", short_side=512, long_side=2048, cache="/scratch"
    )
    url = "https://host/voc"
    assert configure("voc", url, []).data.root == url
    assert configure("lip", "pipe:cat /x/{}", []).data.size == (473, 473)
    # Another index.json is not taken for one of shards.
    (tmp_path / "trainaug" / "index.json").write_text('{"format": "other"}')
    assert isinstance(configure("voc", str(tmp_path), []).data, NamedData)


def test_scenes_size_is_not_a_size_for_testing(tmp_path: Path) -> None:
    assert ShardsData.like(ScenesData(size=(40, 44)), "s") == ShardsData("s")
    scenes = ScenesData(train_count=2, size=(40, 44))
    pack(scenes.dataset("train"), tmp_path, "train", progress=False)
    sample = ShardsData(str(tmp_path)).dataset("train")[0]
    assert torch.equal(sample["image"], scenes.dataset("train")[0]["image"])
    assert ShardsData(str(tmp_path), short_side=20).dataset("train")[0]["image"].shape[1] == 20
