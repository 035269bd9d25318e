"""Finds recipes by name and applies the changes given on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcibi_fast import recipes
from mcibi_fast.data.shards import holds_shards, is_remote
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.recipes.sources import NamedData, ScenesData, ShardsData
from mcibi_fast.recipes.toml import CHOICES, read_toml

_MODEL = ("framework", "backbone", "memory")

# These take any framework, backbone and memory.
FREE_RECIPES = {
    "camvid": recipes.camvid,
    "camvid_lite": recipes.camvid_lite,
    "folder": recipes.folder,
    "coco": recipes.coco,
    "huggingface": recipes.huggingface,
    "ade20k": recipes.ade20k,
    "lip": recipes.lip,
    "cihp": recipes.cihp,
    "cityscapes": recipes.cityscapes,
    "cityscapes_trainval": recipes.cityscapes_trainval,
    "coco_stuff": recipes.coco_stuff,
    "pascal_context": recipes.pascal_context,
    "voc": recipes.voc,
    "vspw": recipes.vspw,
    "camvid_video": recipes.camvid_video,
}


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": recipes.demo,
    "scenes": recipes.scenes,
    "moving_scenes": recipes.moving_scenes,
    **FREE_RECIPES,
}


def configure(
    recipe: str | None,
    root: str | None,
    settings: list[str],
    *,
    file: str | None = None,
    start: str | None = None,
    needs_root: bool = True,
    **model: Any,
) -> TrainConfig:
    """A recipe's configuration with the changes from a file and from the command line.

    What comes later wins: the recipe, the file, then the arguments given here and ``settings``. A
    relative ``root`` in the file is taken from the file's folder.

    Args:
        recipe: a key of `RECIPES`; None takes the file's.
        root: the dataset's folder or zip file.
        settings: see `recipes.apply_settings`.
        file: a TOML file, see `recipes.toml`.
        start: a run or a weights file: the model becomes its model, with its weights
            (`mcibi_fast.models.begin_with`); see `model_of`.
        needs_root: whether a missing root is an error for a recipe that reads a folder.
        model: ``framework``, ``backbone`` and ``memory``, for a recipe that takes them; the memory
            None means no memory.

    Raises:
        ValueError: there is no such recipe or field, or a value does not fit.
        FileNotFoundError: there is no such folder, or no checkpoint in ``start``.
    """
    if start is not None and model:
        raise ValueError(
            f"--from takes the model of {start}; change it with --set model.... instead of "
            f"--{next(iter(model))}"
        )
    table: dict[str, Any] = {}
    if file is not None:
        choices, table = read_toml(file)
        recipe = recipe or choices.get("recipe")
        if root is None and "root" in choices:
            root = choices["root"]
            root = root if is_remote(root) else str(Path(file).resolve().parent / root)
        own: dict[str, Any] = {name: choices[name] for name in _MODEL if name in choices}
        if own.get("memory") == "none":
            own["memory"] = None
        model = own | model
    if recipe not in RECIPES:
        named = f"no recipe {recipe!r}" if recipe else "no recipe given"
        raise ValueError(f"train: {named}; there are {', '.join(RECIPES)} (or --resume DIR)")
    if model and recipe not in FREE_RECIPES:
        option = "without-memory" if model.get("memory", "") is None else next(iter(model))
        raise ValueError(
            f"--{option}: the recipe {recipe} has its own model; change it with "
            "--set model.framework=... model.memory=... model.backbone=..."
        )
    config = FREE_RECIPES[recipe](**model) if model else RECIPES[recipe]()
    if root is not None:
        if isinstance(config.data, ScenesData):
            raise ValueError(f"--root: the recipe {recipe} reads no folder")
        if holds_shards(root):
            config.data = ShardsData.like(config.data, root)
        # A published dataset may also be its zip file.
        elif not (
            Path(root).is_dir() or (isinstance(config.data, NamedData) and Path(root).exists())
        ):
            raise FileNotFoundError(f"--root: {root} is not a folder")
        config.data.root = root if is_remote(root) else str(Path(root).resolve())
    if file is not None:
        recipes.apply_table(config, table, file, also=CHOICES)
    if start is not None:
        config.model = model_of(start)
    recipes.apply_settings(config, settings)
    config.validate(needs_root=needs_root)
    return config


def model_of(checkpoint: str) -> recipes.ModelConfig:
    """The model of a checkpoint, which begins with its weights, as far as the classes are the same.

    Args:
        checkpoint: a run's directory or a weights file.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is not one of this package.
    """
    from mcibi_fast.models.weights import find_weights, read_spec

    spec = read_spec(find_weights(checkpoint))
    options = spec.options | {"pretrained": str(Path(checkpoint).resolve())}
    return recipes.ModelConfig.named(spec.name, spec.backbone, options)
