"""Recipes of the published datasets: the paper's numbers, and a run from start to score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mcibi_fast import cli, models, recipes
from mcibi_fast.data import DATASETS
from mcibi_fast.recipes import ModelConfig, NamedData, TrainConfig, apply_settings
from mcibi_fast.recipes.registry import FREE_RECIPES, RECIPES, configure
from tests.data import trees

# lr, weight decay, crop, batch, epochs; what images are resized to in training; test size
PROTOCOLS = {
    "ade20k": (0.01, 5e-4, (512, 512), 16, 130, (512, 2048, None), (512, 2048, None)),
    "lip": (0.01, 5e-4, (473, 473), 32, 150, (None, None, (520, 520)), (None, None, (473, 473))),
    "cihp": (0.01, 5e-4, (473, 473), 32, 150, (None, None, (520, 520)), (None, None, (473, 473))),
    "cityscapes": (0.01, 5e-4, (512, 1024), 8, 220, (1024, 2048, None), (1024, 2048, None)),
    "coco_stuff": (0.001, 1e-4, (512, 512), 16, 110, (512, 2048, None), (512, 2048, None)),
    "pascal_context": (0.004, 1e-4, (480, 480), 16, 260, (520, 520, None), (520, 520, None)),
    "voc": (0.01, 5e-4, (512, 512), 16, 60, (512, 2048, None), (512, 2048, None)),
}
pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_the_papers_settings(name: str) -> None:
    config = RECIPES[name]()
    data, augmentation = config.data, config.augmentation
    assert isinstance(data, NamedData) and data.name == name
    assert PROTOCOLS[name] == (
        config.optimizer.lr,
        config.optimizer.weight_decay,
        augmentation.crop_size,
        config.batch_size,
        config.epochs,
        (augmentation.short_side, augmentation.long_side, augmentation.size),
        (data.short_side, data.long_side, data.size),
    )
    assert (config.model.name, config.model.backbone) == ("fcn_mcibipp", "resnet50")
    parsing = name in ("lip", "cihp")
    assert augmentation.scale == ((0.75, 1.25) if parsing else (0.5, 2.0))
    assert augmentation.rotation == (30 if parsing else 0)
    assert augmentation.rotation_probability == 0.6 or not parsing
    for split in (data.train_split, data.val_split):
        assert split in DATASETS[name].sizes


# What differs from the rows above: lr, crop, batch, epochs, the backbone's factor.
RESNET101, RESNEST, HRNET = "resnet101", "resnest101e", "hrnet_w48"
SWIN = "swin_large_patch4_window12_384"
VARIATIONS = {
    ("ade20k", RESNET101): (0.01, (512, 512), 16, 130, 1.0),
    ("ade20k", RESNEST): (0.004, (512, 512), 16, 180, 1.0),
    ("ade20k", SWIN): (6e-5, (640, 640), 16, 130, 1.0),
    ("lip", RESNEST): (0.01, (473, 473), 32, 150, 1.0),
    ("lip", HRNET): (0.007, (473, 473), 40, 150, 1.0),
    ("lip", SWIN): (6e-5, (473, 473), 16, 110, 1.0),
    ("cityscapes", RESNEST): (0.004, (512, 1024), 8, 220, 1.0),
    ("cityscapes_trainval", RESNET101): (0.01, (512, 1024), 16, 440, 1.0),
    ("cityscapes_trainval", RESNEST): (0.004, (512, 1024), 16, 440, 1.0),
    ("cityscapes_trainval", HRNET): (0.01, (512, 1024), 16, 440, 1.0),
    ("coco_stuff", RESNET101): (0.001, (512, 512), 16, 110, 1.0),
    ("coco_stuff", RESNEST): (0.001, (512, 512), 32, 150, 1.0),
    ("coco_stuff", SWIN): (6e-5, (512, 512), 16, 150, 1.0),
    ("pascal_context", RESNET101): (0.004, (480, 480), 16, 260, 0.1),
    ("pascal_context", RESNEST): (0.004, (480, 480), 16, 260, 0.1),
    ("pascal_context", SWIN): (6e-5, (480, 480), 16, 260, 1.0),
    ("voc", RESNET101): (0.01, (512, 512), 16, 60, 1.0),
}


@pytest.mark.parametrize(("name", "backbone"), list(VARIATIONS))
def test_the_papers_settings_for_other_backbones(name: str, backbone: str) -> None:
    config = FREE_RECIPES[name]("upernet", backbone)
    config.data.root = "somewhere"
    config.validate()
    optimizer = config.optimizer
    assert VARIATIONS[name, backbone] == (
        optimizer.lr,
        config.augmentation.crop_size,
        config.batch_size,
        config.epochs,
        optimizer.backbone_lr,
    )
    swin = backbone == SWIN
    assert optimizer.name == ("adamw" if swin else "sgd")
    assert (optimizer.power, optimizer.warmup_steps) == ((1.0, 1500) if swin else (0.9, 0))
    assert optimizer.decay_norms is not swin and (optimizer.weight_decay == 0.01 or not swin)
    plain = FREE_RECIPES[name]()
    assert optimizer.weight_decay == plain.optimizer.weight_decay or swin
    assert config.data.train_split == (
        "trainval" if name.endswith("trainval") else plain.data.train_split
    )


def test_swin_on_ade20k_is_tested_at_the_size_of_its_crops() -> None:
    config = recipes.ade20k("upernet", SWIN)
    assert (config.data.short_side, config.data.long_side) == (640, 2560)
    assert (config.augmentation.short_side, config.augmentation.long_side) == (640, 2560)


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        (RESNET101, {}),
        (RESNEST, {}),
        (SWIN, {"output_stride": 32, "drop_path": 0.3}),
        (HRNET, {"output_stride": 4, "auxiliary_weight": 0.0}),
    ],
)
def test_the_model_of_a_recipe(backbone: str, expected: dict, memory: bool) -> None:
    model = recipes.voc("deeplabv3", backbone, memory=memory).model
    if memory and backbone == HRNET:
        expected = expected | {"downsample": True}
    assert model == ModelConfig.named("deeplabv3" + "_mcibipp" * memory, backbone, expected)


@pytest.mark.parametrize("backbone", ["hrnet_w18_small", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("memory", [True, False])
def test_the_models_options_are_those_of_its_head(backbone: str, memory: bool) -> None:
    model = recipes.voc("fcn", backbone, memory=memory).model
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        models.create(model.name, 3, backbone=backbone, **model.options, feats_channels=8)


def test_settings_and_json() -> None:
    config = recipes.lip()
    apply_settings(config, ["data.name=cihp", "data.size=[40,50]", "augmentation.size=null"])
    assert (config.data.name, config.data.size, config.augmentation.size) == (
        "cihp",
        (40, 50),
        None,
    )
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["data"]["kind"] == "NamedData"
    assert TrainConfig.from_dict(stored) == config


def test_a_configuration_from_before_there_were_more_fields() -> None:
    stored = json.loads(json.dumps(recipes.scenes().to_dict()))
    for name in ("short_side", "long_side", "size", "rotation", "rotation_probability"):
        del stored["augmentation"][name]
    for name in ("loss", "adversarial", "accumulate", "ema", "sync_batchnorm"):
        del stored[name]
    for name in ("backbone_lr", "layer_decay", "decay_norms", "warmup_steps", "warmup_start"):
        del stored["optimizer"][name]
    del stored["inference"]
    assert TrainConfig.from_dict(stored) == recipes.scenes()


def test_the_root(tmp_path: Path) -> None:
    archive = trees.pack(trees.ade20k(tmp_path / "tree"), tmp_path / "ADEChallengeData2016.zip")
    config = configure("ade20k", str(archive), [])
    assert len(config.data.dataset("val")) == 1
    with pytest.raises(ValueError, match=r"data\.root: this recipe reads a folder"):
        configure("ade20k", None, [])
    assert not configure("ade20k", None, [], needs_root=False).data.root  # to look at it
    with pytest.raises(FileNotFoundError, match="nothing is not a folder"):
        configure("ade20k", str(tmp_path / "nothing"), [])


def test_the_evaluation_sees_the_test_size_and_whole_labels(tmp_path: Path) -> None:
    root = str(trees.lip(tmp_path))
    sample = NamedData("lip", root, size=(25, 20)).dataset("val")[0]
    assert sample["image"].shape == (3, 25, 20)
    assert sample["label"].shape == trees.SIZE
    sample = NamedData("lip", root, short_side=24).dataset("val")[0]
    assert sample["image"].shape == (3, 24, 36)
    assert NamedData("lip", root).dataset("val")[0]["image"].shape == (3, *trees.SIZE)


@pytest.mark.slow
def test_train_resume_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = str(trees.lip(tmp_path / "lip")), str(tmp_path / "run")
    settings = [
        "model.backbone=test_resnet",
        "model.options.feats_channels=8",
        "model.options.transform_channels=8",
        "epochs=2",
        "evaluate_every=1",
        "batch_size=2",
        "device=cpu",
        "workers=0",
        "augmentation.crop_size=[32,32]",
        "augmentation.size=[40,40]",
        "data.size=[40,48]",
    ]
    assert cli.main(["train", "lip", "--root", root, "--out", out, "--set", *settings]) == 0
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").open()]
    scores = [entry["metrics"] for entry in history if "metrics" in entry]
    assert len(scores) == 2
    assert cli.main(["train", "--resume", out]) == 0
    for extra in ([], ["--root", root]):
        file = tmp_path / "scores.json"
        assert cli.main(["evaluate", out, "--cpu", "--json", str(file), *extra]) == 0
        found = json.loads(file.read_text())
        assert any(entry.items() <= found.items() for entry in scores)
    assert "left arm" in capsys.readouterr().out


def test_training_flips_left_and_right(tmp_path: Path) -> None:
    from mcibi_fast.training.run import Run
    from mcibi_fast.training.trainer import Trainer

    config = configure("lip", str(trees.lip(tmp_path)), ["batch_size=1", "device=cpu"])
    config.model.backbone = "test_resnet"
    config.model.options = {"feats_channels": 8, "transform_channels": 8}
    trainer = Trainer(config, Run(tmp_path / "run"))
    assert trainer.train_data.transform.flip_pairs == ((14, 15), (16, 17), (18, 19))
    assert trainer.val_data.transform.size == (473, 473)
    trainer.close()
