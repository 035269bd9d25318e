"""What commands on a trained model share: the run's own settings, changed by the command line's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcibi_fast.data import CAMVID_CLASSES, DATASETS, named
from mcibi_fast.data.folder import class_list
from mcibi_fast.data.shards import holds_shards
from mcibi_fast.defaults import LARGE_WINDOW
from mcibi_fast.inference.precision import in_words, precision_of
from mcibi_fast.models import Segmentor
from mcibi_fast.models.weights import read_spec
from mcibi_fast.recipes import (
    FolderData,
    InferenceConfig,
    NamedData,
    ShardsData,
    TrainConfig,
)
from mcibi_fast.recipes.registry import RECIPES
from mcibi_fast.recipes.sources import Data, StoredShardsData
from mcibi_fast.training.run import Run

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

# Datasets without a recipe of their own, and the one whose test size they share.
_VARIANTS = {"coco_stuff_171": "coco_stuff", "pascal_context_60": "pascal_context"}


def trained_config(weights: Path) -> TrainConfig | None:
    """The configuration of the run that a weights file lies in, or None.

    That is ``RUN/checkpoints/NAME/FILE`` or ``RUN/FILE``; a ``config.json`` elsewhere above is
    nobody's, and one of `mcibi_fast.models.hub` no run's.
    """
    own, *above = weights.resolve().parents
    folders = [own, *above[1:2]] if above and above[0].name == "checkpoints" else [own]
    for folder in folders:
        if (folder / "config.json").is_file() and "library_name" not in Run(folder).config():
            return Run(folder).settings()
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


def evaluation_data(
    file: Path,
    trained: TrainConfig | None,
    dataset: str | None,
    root: str | None,
    *,
    binary: bool = False,
) -> Data:
    """The dataset named, or the folder or shards given, or the data that the run was trained on.

    The folder of a run on a published dataset holds that dataset, too. A folder's masks are
    ``binary`` if that is said here or by the run.

    Raises:
        ValueError: no such dataset, or it is not said where it is; or it has no binary masks.
    """
    data = _evaluation_data(file, trained, dataset, root)
    if isinstance(data, FolderData):
        own = trained.data if trained and dataset is None else None
        binary = binary or (isinstance(own, FolderData) and own.binary)
        return replace(data, binary=binary)
    if binary:
        raise ValueError("--binary: for the masks of a folder, which the data are not")
    return data


def _evaluation_data(
    file: Path, trained: TrainConfig | None, dataset: str | None, root: str | None
) -> Data:
    data: Data | None = trained.data if trained else None
    is_own = dataset is None or (isinstance(data, NamedData) and data.name == dataset)
    if dataset is not None and not is_own:
        data = (
            FolderData(classes=list(CAMVID_CLASSES))
            if dataset == "camvid"
            else published_data(dataset, trained)
        )
    if root is None:
        if data is None:
            raise ValueError(
                f"evaluate: {file} is in no run's directory; name the data with --root DIR"
            )
        if not is_own:
            raise ValueError(f"--dataset {dataset}: say where it is with --root DIR")
        return data
    if holds_shards(root):
        return ShardsData.like(data or FolderData(), root)
    if isinstance(data, NamedData) or (isinstance(data, FolderData) and not is_own):
        return replace(data, root=root)
    # A folder that lists no classes is taken to have the checkpoint's.
    listed = class_list(Path(root)) is not None
    return FolderData(root=root, classes=None if listed else read_spec(file).classes)


def submission_data(
    submission: str | None, trained: TrainConfig | None
) -> NamedData | ShardsData | None:
    """The published dataset that gives test size, mirrored classes and ids: the run's, if any.

    Args:
        submission: its name; "" for the run's, which must then be one; None where none is written.
        trained: the run.

    Raises:
        ValueError: no such dataset.
    """
    own = trained.data if trained else None
    if not isinstance(own, (NamedData, ShardsData)):
        own = None
    if submission is None:
        return own
    name = submission or (own.name if isinstance(own, NamedData) else "")
    if name not in DATASETS and not submission:
        raise ValueError("--submission: the checkpoint is of no published dataset; name one")
    return own if isinstance(own, NamedData) and own.name == name else published_data(name, trained)


def mirrored_classes(data: object) -> Sequence[tuple[int, int]]:
    """Classes that a mirrored image swaps, of a run's data."""
    if isinstance(data, StoredShardsData):
        raise ValueError(
            f"--flip: which classes a mirrored image swaps is in the run's shards ({data.root}), "
            "which are not fetched because its config.json says so; give --no-flip"
        )
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


def large_window(args: argparse.Namespace, trained: TrainConfig | None) -> tuple[int, int] | None:
    """Windows for large images: as large as the run's crops and at least `LARGE_WINDOW`.

    None with ``--window none``.
    """
    if args.window == "none":
        return None
    height, width = trained.augmentation.crop_size if trained else LARGE_WINDOW
    return max(height, LARGE_WINDOW[0]), max(width, LARGE_WINDOW[1])


def set_precision(
    args: argparse.Namespace, model: Segmentor, trained: TrainConfig | None, device: torch.device
) -> str:
    """Sets the precision in which the model is evaluated, and returns the words for it.

    That is ``--precision``, or else that of the training.
    """
    if trained is not None:
        model.precision = trained.mixed_precision  # older checkpoints do not say it
    if args.precision is not None:
        model.precision = args.precision
    wanted, model.precision = model.precision, precision_of(model, device)
    note = "" if wanted == model.precision else f", because {wanted} needs a GPU"
    return in_words(model.precision) + note


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


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    """The processes and the device of this run; ``--cpu`` leaves a GPU unused."""
    from mcibi_fast.training import processes

    return processes.start_accelerator(cpu=args.cpu)
