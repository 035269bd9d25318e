"""The training configurations of a table's rows."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

from mcibi_fast import recipes
from mcibi_fast.ablations.table import SCENES, VIDEOS, Row, Table
from mcibi_fast.models import creation, registry
from mcibi_fast.recipes import TrainConfig
from mcibi_fast.recipes.registry import RECIPES, configure


def base_config(table: Table, data: str, root: str | None, settings: Sequence[str]) -> TrainConfig:
    """The configuration that all rows share.

    Args:
        table: the table; its model is the model of the base.
        data: "scenes" (the built-in data with the demo's recipe) or a dataset that has a recipe.
        root: the dataset's folder.
        settings: changes, as ``--set`` takes them.

    Raises:
        ValueError: there is no such dataset, it does not suit the table, or a setting changes a
            field that the rows vary.
    """
    if data not in (known := datasets()):
        raise ValueError(f"--data: no dataset {data!r}; there are {', '.join(known)}")
    which = table.source.partition(",")[0]
    if table.data not in (None, data):
        raise ValueError(
            f"--data: {which} is about {table.data}; give --data {table.data} --root DIR"
        )
    if table.videos and data not in VIDEOS:
        raise ValueError(f"--data: {which} is about videos; there are {', '.join(VIDEOS)}")
    varied = sorted({s.partition("=")[0].strip() for s in settings} & table.varied())
    if varied:
        raise ValueError(f"--set {varied[0]}: cannot be set, as the rows of this table vary it")
    recipe = "demo" if data == SCENES else data
    own = table.base.get(data, ())
    return configure(recipe, root, [f"model.name={table.model}", *own, *settings])


def datasets() -> list[str]:
    """The names that ``--data`` accepts."""
    return [name for name in RECIPES if name != "demo"]


def row_config(base: TrainConfig, row: Row, seed: int) -> TrainConfig:
    """The base with the row's settings.

    A row keeps only the options of the base that its model has: options of MCIBI++ mean nothing to
    FCN, and on videos the base may have options of other methods.
    """
    config = copy.deepcopy(base)
    recipes.apply_settings(config, row.settings)
    others = [base.model.name]
    if hasattr(base.data, "history"):
        others += [f"ocrnet_{method}" for method in registry.video_methods()]  # all take OCRNet
    foreign = set().union(*map(_options_of, others)) - _options_of(config.model.name)
    options = config.model.options
    config.model.options = {k: v for k, v in options.items() if k not in foreign}
    config.seed = seed
    return config


def _options_of(model: str) -> set[str]:
    """The options that `models.create` takes for a model, including those of its head."""
    kind = registry.parse(model)
    head = registry.head_type(
        kind.framework, kind.memory, video=kind.history > 0, method=kind.method
    )
    makers: list[Any] = [creation.create, *head.__mro__[:-1]]
    return {name for maker in makers for name in inspect.signature(maker).parameters}


def usual_backbone(data: str, root: str | None) -> str:
    """The backbone of a dataset's recipe, which the names of runs leave out."""
    return configure("demo" if data == SCENES else data, root, []).model.backbone


def run_name(base: TrainConfig, row: Row, seed: int, usual: str | None = None) -> str:
    """The name of a run's directory: its model, what else differs from the base, and its seed.

    Tables share directories, so a backbone other than ``usual`` is named, too. (Earlier versions
    did not name it: without ``usual`` this is their name.)
    """
    fields = dict(setting.split("=", 1) for setting in row.settings)
    model = fields.pop("model.name", base.model.name)
    if usual is not None:
        fields = {"model.backbone": base.model.backbone} | fields
        if fields["model.backbone"] == usual:
            del fields["model.backbone"]
    changes = {f"{name.rpartition('.')[2]}={value}": None for name, value in fields.items()}
    return "-".join([model, *changes, f"seed{seed}"]).replace("/", "_")


def select_rows(table: Table, chosen: str | None) -> list[Row]:
    """The rows that ``--rows`` asks for: names or numbers (from 1), separated by commas.

    Raises:
        ValueError: there is no such row.
    """
    if chosen is None:
        return list(table.rows)
    names = {row.name.lower(): row for row in table.rows}
    numbers = {str(number): row for number, row in enumerate(table.rows, 1)}
    wanted = [text.strip().lower() for text in chosen.split(",")]
    for text in wanted:
        if text not in names | numbers:
            listed = ", ".join(f"{n} {row.name}" for n, row in numbers.items())
            raise ValueError(f"--rows: no row {text!r}; there are {listed}")
    picked = [names.get(text) or numbers[text] for text in wanted]
    return [row for row in table.rows if row in picked]


def check_test_data(table: Table, test_root: str | None) -> None:
    """Opens the second dataset of a table that tests its models on another one as well.

    Raises:
        ValueError: the table needs a second dataset and none was given, or it needs none and one
            was given, or the dataset cannot be read.
    """
    if table.test_data is None:
        if test_root is not None:
            raise ValueError("--test-root: this table does not test on a second dataset")
        return
    if test_root is None:
        raise ValueError(
            f"--test-root: {table.source.partition(',')[0]} also tests on {table.test_data}; give "
            "its folder with --test-root DIR"
        )
    recipes.NamedData(table.test_data, root=test_root).dataset("val")


def check_models(configs: Sequence[TrainConfig]) -> None:
    """Opens the data and builds every model once, so that errors show before any training.

    Args:
        configs: the configurations of the rows, all with the same data.

    Raises:
        ValueError: the data, or an option of a model, cannot be used.
    """
    from mcibi_fast.inference.labels import check_model
    from mcibi_fast.models.checkpoint import create_model
    from mcibi_fast.models.weights import ModelSpec

    data = configs[0].data
    data.dataset(data.train_split)
    dataset = data.dataset(data.val_split)
    for config in configs:
        config.validate()
        spec = ModelSpec(
            name=config.model.name,
            backbone=config.model.backbone,
            options=config.model.arguments(),
            classes=list(dataset.classes),
            palette=dataset.palette.tolist(),
            mean=list(dataset.mean),
            std=list(dataset.std),
            ignore_index=dataset.ignore_index,
        )
        model = create_model(spec, pretrained=False)
        check_model(model, config.inference)
