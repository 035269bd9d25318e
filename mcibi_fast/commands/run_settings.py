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
from mcibi_fast.inference.folding import folded, folded_if_possible
from mcibi_fast.inference.precision import in_words, precision_of
from mcibi_fast.inference.trained import (
    own_test_data,
    usual_inference,
    usual_window,
)
from mcibi_fast.models import Segmentor
from mcibi_fast.models.released_backbones import PREFIX
from mcibi_fast.models.weights import read_spec
from mcibi_fast.protocols import TEST_PROTOCOLS
from mcibi_fast.recipes import (
    CocoData,
    FolderData,
    HuggingFaceData,
    InferenceConfig,
    NamedData,
    ShardsData,
    TrainConfig,
)
from mcibi_fast.recipes.registry import FREE_RECIPES
from mcibi_fast.recipes.sources import FORMATS, Data, Sized
from mcibi_fast.terminal import say

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from mcibi_fast.models.compilation import CompileTime

# Datasets without a recipe of their own, and the one whose test size they share.
_VARIANTS = {"coco_stuff_171": "coco_stuff", "pascal_context_60": "pascal_context"}


def published_data(name: str, trained: TrainConfig | None, backbone: str) -> NamedData:
    """A published dataset's splits and its test size with a backbone, without its root.

    A run on a published dataset brings its own test size: what it learnt is of that size.

    Raises:
        ValueError: there is none of that name.
    """
    named(name)
    recipe = FREE_RECIPES.get(_VARIANTS.get(name, name))
    backbone = backbone.removeprefix(PREFIX)  # a converted one has the sizes of its family
    data = recipe(backbone=backbone).data if recipe else NamedData()
    assert isinstance(data, NamedData)
    data = replace(data, name=name)
    if trained and isinstance(trained.data, Sized):
        own = trained.data
        data = replace(data, short_side=own.short_side, long_side=own.long_side, size=own.size)
    return data


def evaluation_data(
    file: Path,
    trained: TrainConfig | None,
    dataset: str | None,
    root: str | None,
    *,
    binary: bool | None = None,
    reduce_labels: bool | None = None,
) -> Data:
    """The dataset named, or the folder or shards given, or the data that the run was trained on.

    The folder of a run on a published dataset holds that dataset, too. A folder's masks are read
    as ``binary`` or with ``reduce_labels`` as said here or, if both are None, as in the run.

    Raises:
        ValueError: no such dataset, or it is not said where it is; or its masks are not read in
            such a way.
    """
    data = _evaluation_data(file, trained, dataset, root)
    if isinstance(data, FolderData):
        own = trained.data if trained and dataset is None else None
        if isinstance(own, FolderData) and binary is None and reduce_labels is None:
            binary, reduce_labels = own.binary, own.reduce_labels
        return replace(data, binary=bool(binary), reduce_labels=bool(reduce_labels))
    if binary:
        raise ValueError("--binary: for the masks of a folder, which the data are not")
    if isinstance(data, HuggingFaceData):
        return data if reduce_labels is None else replace(data, reduce_labels=reduce_labels)
    if reduce_labels:
        raise ValueError(
            "--reduce-labels: for the masks of a folder or of huggingface data, which the data "
            "are not"
        )
    return data


def _evaluation_data(
    file: Path, trained: TrainConfig | None, dataset: str | None, root: str | None
) -> Data:
    data: Data | None = trained.data if trained else None
    is_own = dataset is None or (isinstance(data, NamedData) and data.name == dataset)
    if dataset in FORMATS and isinstance(data, FORMATS[dataset]):
        is_own = True
    if dataset is not None and not is_own:
        if dataset == "camvid":
            data = FolderData(classes=list(CAMVID_CLASSES))
        elif dataset in FORMATS:
            data = FORMATS[dataset]()
        else:
            data = published_data(dataset, trained, read_spec(file).backbone)
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
    if isinstance(data, NamedData | CocoData | HuggingFaceData) or (
        isinstance(data, FolderData) and not is_own
    ):
        return replace(data, root=root)
    # A folder that lists no classes is taken to have the checkpoint's.
    listed = class_list(Path(root)) is not None
    return FolderData(root=root, classes=None if listed else read_spec(file).classes)


def submission_data(
    submission: str | None, trained: TrainConfig | None, backbone: str
) -> Sized | None:
    """The published dataset that gives test size, mirrored classes and ids: the run's, if any.

    Args:
        submission: its name; "" for the run's, which must then be one; None where none is written.
        trained: the run.
        backbone: the checkpoint's.

    Raises:
        ValueError: no such dataset.
    """
    own = own_test_data(trained)
    if submission is None:
        return own
    name = submission or (own.name if isinstance(own, NamedData) else "")
    if name not in DATASETS and not submission:
        raise ValueError("--submission: the checkpoint is of no published dataset; name one")
    if isinstance(own, NamedData) and own.name == name:
        return own
    return published_data(name, trained, backbone)


def inference_config(
    args: argparse.Namespace, trained: TrainConfig | None, file: Path
) -> InferenceConfig:
    """The checkpoint's or the run's settings with those of the command line in their place.

    If the checkpoint brings the released protocol, one line says so.

    Args:
        args: the command line.
        trained: the checkpoint's run.
        file: the checkpoint.

    Raises:
        ValueError: naming the option whose text is not what it should be, or the checkpoint.
    """
    brought = getattr(read_spec(file), "inference", None)
    usual = usual_inference(trained, brought, file)
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
    for name in ("softmax", "stages", "threshold"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    if (protocol := chosen_protocol(args, TEST_PROTOCOLS)) is not None:
        changes["protocol"] = protocol
    inference = replace(usual, **changes)
    inference.validate()
    if brought is not None and protocol is None and inference.protocol == "released":
        say(
            "tested by the released protocol, with which the checkpoint's published number was "
            "made (--protocol own: by this package's)"
        )
    return inference


def chosen_protocol(args: argparse.Namespace, names: Sequence[str]) -> str | None:
    """The one of these that ``--protocol`` names, or None.

    Raises:
        ValueError: it names several.
    """
    found = [name for name in args.protocol if name in names]
    if len(set(found)) > 1:
        raise ValueError(f"--protocol: give one of {' and '.join(names)}, not both")
    return found[0] if found else None


def large_window(args: argparse.Namespace, trained: TrainConfig | None) -> tuple[int, int] | None:
    """Windows for large images: as large as the run's crops and at least `LARGE_WINDOW`.

    None with ``--window none``.
    """
    return None if args.window == "none" else usual_window(trained)


def set_precision(
    args: argparse.Namespace, model: Segmentor, trained: TrainConfig | None, device: torch.device
) -> str:
    """Sets the precision in which the model is evaluated, and returns the words for it.

    That is ``--precision``, or else that of the training.
    """
    if trained is not None:
        model.precision = trained.precision  # older checkpoints do not say it
    if args.precision is not None:
        model.precision = args.precision
    wanted, model.precision = model.precision, precision_of(model, device)
    note = "" if wanted == model.precision else f", because {wanted} needs a GPU"
    return in_words(model.precision) + note


def prepared(args: argparse.Namespace, model: Segmentor, name: str) -> Segmentor:
    """The model in the form in which it is fastest; as it was trained with ``--no-fold``.

    In mixed precision, too, it stays as it was trained unless ``--fold`` is given: folded weights
    are rounded differently, and labels would change.

    Args:
        args: of the command line.
        model: with its precision set (`set_precision`).
        name: the model's.

    Raises:
        ValueError: ``--fold`` is given and the model cannot be folded.
    """
    if args.fold is None:
        return folded_if_possible(model) if model.precision == "no" else model
    if not args.fold:
        return model
    if not model.head.has_memory:
        raise ValueError(f"--fold: needs a model with a memory; {name} has none")
    try:
        return folded(model)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--fold: {error}") from None


def compiled(args: argparse.Namespace, model: Segmentor) -> CompileTime | None:
    """With ``--compile``, compiles the model when it is first called, for images of any size.

    Returns:
        What tells how long it took; None if nothing is compiled.
    """
    if not args.compile:
        return None
    from mcibi_fast.models.compilation import CompileTime, compile_model

    compile_model(model, sizes_differ=True)
    return CompileTime(say)


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
