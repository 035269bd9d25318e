"""``--set``, recipes, and the configuration's way to JSON and back."""

from __future__ import annotations

import json

import pytest

from mcibi_fast import recipes
from mcibi_fast.recipes import TrainConfig, apply_settings
from mcibi_fast.recipes.registry import RECIPES
from mcibi_fast.recipes.settings import field_names


@pytest.mark.parametrize(
    ("setting", "name", "expected"),
    [
        ("optimizer.lr=0.02", "optimizer.lr", 0.02),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.name=adamw", "optimizer.name", "adamw"),
        ("optimizer.clip_norm=2.5", "optimizer.clip_norm", 2.5),
        ("optimizer.clip_norm=null", "optimizer.clip_norm", None),
        ("optimizer.clip_norm=none", "optimizer.clip_norm", None),
        ("model.memory=none", "model.memory", None),
        ("epochs = 7", "epochs", 7),
        ("augmentation.crop_size=[32,48]", "augmentation.crop_size", (32, 48)),
        ("augmentation.scale=[1,2]", "augmentation.scale", (1.0, 2.0)),
        ("mixed_precision=bf16", "mixed_precision", "bf16"),
        ("model.backbone=resnet18", "model.backbone", "resnet18"),
        ("data.seed=3", "data.seed", 3),
        ("ema=0.999", "ema", 0.999),
        ("loss.class_weights=balanced", "loss.class_weights", "balanced"),
        ("loss.class_weights=[1,0.5]", "loss.class_weights", [1, 0.5]),
        ("inference.scales=[0.5,1]", "inference.scales", (0.5, 1.0)),
        ("inference.window=[512,256]", "inference.window", (512, 256)),
        ("inference.flip=true", "inference.flip", True),
    ],
)
def test_values_take_the_field_type(setting: str, name: str, expected: object) -> None:
    config = recipes.scenes()
    apply_settings(config, [setting])
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


def test_options_take_any_key() -> None:
    config = recipes.scenes()
    apply_settings(config, ["model.options.noise=none"])
    assert config.model.options["noise"] == "none"  # a text: any value may stand there
    apply_settings(config, ["model.options.form=paper", "model.options.hard=true"])
    assert config.model.options["form"] == "paper" and config.model.options["hard"] is True


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr=0.02", "--set lr: no such field; did you mean optimizer.lr?"),
        ("optimizer.learning_rat=1", "no such field"),
        ("epoch=1", "did you mean epochs?"),
        ("optimiser.lr=0.1", "did you mean optimizer.lr?"),
        ("augmentation.crop=[3,3]", "did you mean augmentation.crop_size?"),
        ("data.nothing.deep=1", "no such field"),
        ("optimizer=1", "no such field"),
        ("epochs", "--set epochs: expected FIELD=VALUE"),
        ("epochs=ten", "--set epochs=ten: expected int"),
        ("epochs=1.5", "--set epochs=1.5: expected int"),
        ("epochs=true", "--set epochs=true: expected int"),
        ("optimizer.lr=true", "expected float"),
        ("optimizer.name=sdg", "--set optimizer.name=sdg: expected one of sgd, adamw"),
        ("augmentation.crop_size=32", "expected 2 numbers such as [1,1]"),
        ("augmentation.crop_size=[1,2,3]", "expected 2 numbers such as [1,1]"),
        ("optimizer.clip_norm=x", "expected float or null"),
        ("loss.class_weights=even", "expected a list such as [0.5,1] or one of balanced or null"),
        ("inference.scales=1", "expected numbers such as [0.5,0.5]"),
        ("inference.stride=[1]", "expected 2 numbers such as [1,1]"),
    ],
)
def test_errors_name_the_field_and_the_nearest(setting: str, message: str) -> None:
    config = recipes.scenes()
    with pytest.raises(ValueError) as info:
        apply_settings(config, [setting])
    assert message in str(info.value)
    assert config == recipes.scenes()


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_survive_json(name: str) -> None:
    config = RECIPES[name]()
    stored = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(stored) == config
    assert type(TrainConfig.from_dict(stored).data) is type(config.data)


def test_every_field_can_be_set_to_itself() -> None:
    config = recipes.scenes()
    for name in field_names(config):
        if not name.endswith(".*"):
            value = config
            for part in name.split("."):
                value = getattr(value, part)
            text = value if isinstance(value, str) else json.dumps(value)
            apply_settings(config, [f"{name}={text}"])
    assert config == recipes.scenes()


@pytest.mark.parametrize(
    "stored", [{}, {"data": {"kind": "Other"}}, {"data": {"kind": "ScenesData"}}]
)
def test_not_a_configuration(stored: dict) -> None:
    with pytest.raises(ValueError, match="not a training configuration"):
        TrainConfig.from_dict(stored)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epochs=0", "epochs: expected at least 1, got 0"),
        ("workers=-1", "workers: expected 0 or more, got -1"),
        ("optimizer.lr=-1", "optimizer.lr: expected a positive number"),
        ("optimizer.lr=NaN", "optimizer.lr: expected a positive number"),
        ("inference.scales=[0]", "inference.scales: expected positive numbers"),
    ],
)
def test_numbers_that_make_no_sense(setting: str, message: str) -> None:
    config = recipes.demo()
    apply_settings(config, [setting])
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_demo_differs_between_models_in_the_model_alone() -> None:
    fcn, ours = recipes.demo("fcn"), recipes.demo("fcn_mcibipp")
    assert fcn.model.backbone == ours.model.backbone
    assert fcn.model.options.items() <= ours.model.options.items()
    fcn.model = ours.model
    assert fcn == ours
