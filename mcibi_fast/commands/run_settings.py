"""What ``evaluate`` and ``predict`` share: a run's own settings, and the command line's changes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcibi_fast.data import DATASETS, named
from mcibi_fast.recipes import InferenceConfig, NamedData, ShardsData, TrainConfig
from mcibi_fast.recipes.registry import RECIPES
from mcibi_fast.training.run import Run

# Datasets without a recipe of their own, and the one whose test size they share.
_VARIANTS = {"coco_stuff_171": "coco_stuff", "pascal_context_60": "pascal_context"}


def trained_config(weights: Path) -> TrainConfig | None:
    """The configuration of the run that a weights file lies in, or None."""
    for folder in weights.resolve().parents[:3]:
        if (folder / "config.json").is_file():
            return TrainConfig.from_dict(Run(folder).config())
    return None


def published_data(name: str, trained: TrainConfig | None) -> NamedData:
    """A published dataset's splits and test size, without its root.

    A run on a published dataset brings its own test size: what it learnt is of that size.

    Raises:
        ValueError: there is none of that name.
    """
    named(name)
    recipe = RECIPES.get(_VARIANTS.get(name, name))
    data = recipe().data if recipe else NamedData()
    assert isinstance(data, NamedData)
    data = replace(data, name=name)
    if trained and isinstance(trained.data, (NamedData, ShardsData)):
        own = trained.data
        data = replace(data, short_side=own.short_side, long_side=own.long_side, size=own.size)
    return data


def mirrored_classes(data: object) -> Sequence[tuple[int, int]]:
    """Classes that a mirrored image swaps, of a run's data."""
    if isinstance(data, ShardsData):
        return data.dataset(data.val_split).flip_pairs  # only the shards know them
    known = DATASETS.get(data.name) if isinstance(data, NamedData) else None
    return known.flip_pairs if known else ()


def inference_config(args: argparse.Namespace, trained: TrainConfig | None) -> InferenceConfig:
    """The run's settings with those of the command line in their place.

    Raises:
        ValueError: naming the option whose text is not what it should be.
    """
    changes: dict[str, Any] = {}
    if args.scales is not None:
        changes["scales"] = tuple(_numbers("--scales", args.scales, float, "0.5,0.75,1"))
    if args.flip is not None:
        changes["flip"] = args.flip
    if args.window == "none":
        changes |= {"window": None, "stride": None}
    elif args.window is not None:
        changes |= {"window": _sides("--window", args.window), "stride": None}
    if args.stride is not None:
        changes["stride"] = _sides("--stride", args.stride)
    for name in ("softmax", "stages"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    inference = replace(trained.inference if trained else InferenceConfig(), **changes)
    inference.validate()
    return inference


def class_indices(option: str, text: str, count: int) -> list[int]:
    """Such as "10,12", each below ``count`` and named once.

    Raises:
        ValueError: anything else.
    """
    indices = _numbers(option, text, int, "10,12")
    if any(not 0 <= index < count for index in indices):
        raise ValueError(f"{option} {text}: classes are 0..{count - 1}")
    if len(set(indices)) < len(indices) or len(indices) == count:
        raise ValueError(f"{option} {text}: name each class once, and not all {count}")
    return indices


def _sides(option: str, text: str) -> tuple[int, int]:
    sides = _numbers(option, text, int, "512,512")
    if len(sides) not in (1, 2):
        raise ValueError(f"{option} {text}: expected H,W such as 512,512, or one for both")
    return sides[0], sides[-1]


def _numbers(option: str, text: str, kind: type, example: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text}: expected numbers such as {example}") from None
