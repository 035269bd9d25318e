"""The data of a run: how its images are normalised, and whether they are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from mcibi_fast.data import SegmentationDataset
from mcibi_fast.data.base import renormalised
from mcibi_fast.data.functions import Augmentation, FunctionTransform
from mcibi_fast.data.video import ClipDataset
from mcibi_fast.models.creation import normalisation
from mcibi_fast.models.fine_tuning import own_checkpoint
from mcibi_fast.models.weights import ModelSpec, find_weights, moved_class, read_spec
from mcibi_fast.recipes.config import TrainConfig
from mcibi_fast.training.run import Run

Splits = tuple[SegmentationDataset, SegmentationDataset]


def model_spec(config: TrainConfig, train: SegmentationDataset) -> ModelSpec:
    """What a checkpoint says about its model; ``config.mixed_precision`` must be definite."""
    return ModelSpec(
        name=config.model.name,
        backbone=config.model.backbone,
        options=config.model.arguments(),
        classes=list(train.classes),
        palette=train.palette.tolist(),
        mean=list(train.mean),
        std=list(train.std),
        ignore_index=train.ignore_index,
        mixed_precision=config.precision,
    )


def open_splits(
    config: TrainConfig,
    run: Run,
    *,
    resume: bool,
    report: Callable[[str], None],
    augmentation: Augmentation | None = None,
) -> Splits:
    """The training split with its transform, and the validation split.

    Images are normalised as ``data.mean`` and ``data.std`` say; without them, as the pretrained
    weights expect; and for fresh weights by the dataset's own numbers. A resumed run goes on with
    those of its checkpoint.

    Args:
        config: the run's configuration.
        run: its directory.
        resume: whether it continues.
        report: takes a line if the numbers are not the dataset's own.
        augmentation: see `training.train.train`.

    Raises:
        ValueError: the data cannot be used, or a run would continue with other data.
    """
    data, model = config.data, config.model
    train, val = data.dataset(data.train_split), data.dataset(data.val_split)
    mean: Sequence[float]
    std: Sequence[float]
    if list(train.classes) != list(val.classes):
        what = _change_of_classes(train.classes, val.classes, f"in {data.val_split}")
        raise ValueError(f"data: the classes of the splits differ: {what}")
    if len(train.classes) == 1:
        raise ValueError(
            f"data: one class ({train.classes[0]}) leaves nothing to tell apart; the background is "
            "a class, too (masks of 0 and 255 in a folder: data.binary=true)"
        )
    if resume:
        _check_unchanged(run, describe(train, val), report)
        spec = read_spec(run.weights())
        mean, std = spec.mean, spec.std
        own = tuple(mean) == tuple(train.mean) and tuple(std) == tuple(train.std)
        reason = "" if own else "the checkpoint"
    else:
        expected = normalisation(model.backbone, model.options.get("pretrained", False))
        mean, std = expected or (train.mean, train.std)
        reason = f"the pretrained weights of {model.backbone}" if expected else ""
        if moved := _moved_class(model.options, train):
            report(f"warning: {moved}")
        if data.mean or data.std:
            mean, std, reason = data.mean or mean, data.std or std, "data.mean and data.std"
    if reason:
        report(f"images are normalised by mean {_shown(mean)}, deviation {_shown(std)} ({reason})")
    train, val = renormalised(train, (mean, std)), renormalised(val, (mean, std))
    train.transform = config.augmentation.transform(train, config.seed, augmentation)
    if isinstance(train.transform, FunctionTransform) and train.flip_pairs:
        report(
            f"warning: {train.transform.name}: a mirrored image must swap the classes "
            f"{', '.join(f'{a} and {b}' for a, b in train.flip_pairs)}, which the function has to "
            "do itself"
        )
    return train, val


def _moved_class(options: dict[str, Any], train: SegmentationDataset) -> str:
    """See `moved_class`; of the checkpoint whose weights the model begins with.

    With another number of classes nothing of the model that depends on them is taken over.
    """
    checkpoint = own_checkpoint(options.get("pretrained", False))
    if checkpoint is None:
        return ""
    trained = read_spec(find_weights(checkpoint)).classes
    if len(trained) != len(train.classes):
        return ""
    taken = "what the model keeps for each (classifiers, memory) is taken over by number"
    return moved_class(trained, train.classes, taken)


def describe(train: SegmentationDataset, val: SegmentationDataset) -> dict[str, Any]:
    """What a run keeps of its data: the classes, and of both splits the number and the names.

    Names do not depend on where a dataset lies, or on whether it is packed.
    """
    return {
        "classes": list(train.classes),
        "train": describe_split(train),
        "val": describe_split(val),
    }


def describe_split(dataset: SegmentationDataset) -> dict[str, Any]:
    """The number of images and a hash of their names."""
    return {"images": len(dataset), "names": _fingerprint(dataset)}


def _fingerprint(dataset: SegmentationDataset) -> str:
    """A hash of the samples' names in order; of clips, of all labelled frames."""
    named = dataset.source if isinstance(dataset, ClipDataset) else dataset
    names = hashlib.sha256()
    for index in range(len(named)):
        names.update(named.name(index).encode("utf-8", "surrogateescape") + b"\0")
    return names.hexdigest()


def _check_unchanged(run: Run, now: dict[str, Any], report: Callable[[str], None]) -> None:
    """Raises ValueError if the run began with other data. Runs of earlier versions do not say."""
    before = run.data()
    if before is None:
        report(
            f"resume: {run.path} does not say what data it began with, so it goes on with what is "
            "there now"
        )
    elif what := _change(before, now):
        raise ValueError(
            f"resume: the data of {run.path} have changed: {what}; bring the old data back "
            "(--root says where they are), or start a new run with another --out"
        )


def _change(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two descriptions, in words; "" if nothing does."""
    for split, what in (("train", "training"), ("val", "validation")):
        old, new = before[split], now[split]
        if old["images"] != new["images"]:
            return f"{old['images']} {what} images, now {new['images']}"
        if old["names"] != new["names"]:
            return f"other {what} images, or the same in another order"
    return _change_of_classes(before["classes"], now["classes"], "now")


def _change_of_classes(old: list[str], new: list[str], when: str) -> str:
    if len(old) != len(new):
        return f"{len(old)} classes, {when} {len(new)}"
    pairs = enumerate(zip(old, new, strict=True))
    return next((f"class {i} {a!r}, {when} {b!r}" for i, (a, b) in pairs if a != b), "")


def _shown(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers)
