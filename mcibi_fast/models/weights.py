"""Weights files: safetensors with the model's specification in their header."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from torch import Tensor, nn

from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.errors import and_more
from mcibi_fast.limits import check_field, check_limit
from mcibi_fast.typed import describe, fits
from mcibi_fast.untrusted import parse_json

WEIGHTS = "model.safetensors"

Precision = Literal["no", "bf16", "fp16"]
LATER_ENTRIES: dict[str, Any] = {"mixed_precision": "no", "inference": None}
"""Entries of a specification that older files do not have, and what they mean there."""

Shapes = Mapping[str, tuple[int, ...]]
_METADATA_KEY = "mcibi_fast"


@dataclass(frozen=True)
class ModelSpec:
    """What is needed to rebuild a model, prepare its input and read its predictions.

    It is stored with the weights.

    Attributes:
        name, backbone, options: arguments of `mcibi_fast.models.create`.
        classes: K class names.
        palette: K colours (r, g, b).
        mean, std: normalisation of the images, per channel.
        ignore_index: label of pixels that count neither in losses nor in scores.
        mixed_precision: of the training; the model is evaluated in it as well. Older files do not
            have it.
        inference: how the authors tested a converted checkpoint, as fields of
            :class:`mcibi_fast.recipes.InferenceConfig`; None if that is unknown and in older files.
    """

    name: str
    backbone: str
    options: dict[str, Any]
    classes: list[str]
    palette: list[list[int]]
    mean: list[float]
    std: list[float]
    ignore_index: int = IGNORE_INDEX
    mixed_precision: Precision = "no"
    inference: dict[str, Any] | None = None


def moved_class(
    trained: Sequence[str],
    data: Sequence[str],
    result: str = "predictions are compared with labels by number",
) -> str:
    """A line about a class that a checkpoint and data both have under different numbers, or "".

    Args:
        trained: the class names of the checkpoint.
        data: those of the data that it is used with.
        result: what comes of it.
    """
    for index, name in enumerate(trained):
        if name in data and (there := list(data).index(name)) != index:
            return (
                f"class {name!r} is number {index} of the checkpoint, but {there} of the data: the "
                f"classes have another order, and {result}"
            )
    return ""


def pack_weights(model: nn.Module, spec: ModelSpec) -> bytes:
    """The model's state dict and its specification as the bytes of a safetensors file.

    Raises:
        ValueError: a weight is not finite; the file could replace a good one.
    """
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"checkpoint: {name} holds values that are not finite; not saved")
    return safetensors.torch.save(state, metadata={_METADATA_KEY: json.dumps(asdict(spec))})


def find_weights(path: str | Path) -> Path:
    """The weights file that a path means: the file itself, or one in a directory.

    The directory may be that of a checkpoint or of a run. A run's directory means its best
    checkpoint, or its last one if none was evaluated yet.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    path = Path(path)
    if path.is_file():
        return path
    for relative in ("", "checkpoints/best", "checkpoints/last"):
        candidate = path / relative / WEIGHTS
        if candidate.is_file():
            return candidate
    what = "holds no checkpoint" if path.exists() else "does not exist"
    raise FileNotFoundError(f"checkpoint: {path} {what}")


def read_spec(path: str | Path) -> ModelSpec:
    """The specification stored in a weights file.

    Raises:
        ValueError: the file was not written by this package, or its specification does not describe
            a model.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {})[_METADATA_KEY]
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint: {path} is not a checkpoint of mcibi_fast (a safetensors file that "
            "`mcibi-fast train` wrote), or it is cut off"
        ) from error
    return parse_spec(text, path)


def parse_spec(text: str, path: str | Path) -> ModelSpec:
    """The specification in a text that the file ``path`` holds.

    Raises:
        ValueError: it does not describe a model.
    """
    try:
        return _checked(text)
    except ValueError as error:
        raise ValueError(f"checkpoint: {path} has no specification of a model: {error}") from error


def _checked(text: str) -> ModelSpec:
    check_limit("MAX_JSON_BYTES", len(text), f"it has {len(text):,} characters")
    stored = parse_json(text)
    if not isinstance(stored, dict):
        raise ValueError("it is no dictionary")
    stored = LATER_ENTRIES | stored
    for name, annotation in typing.get_type_hints(ModelSpec).items():
        if name not in stored:
            raise ValueError(f"it has no {name!r}")
        if not fits(stored[name], annotation):
            raise ValueError(f"{name}: expected {describe(annotation)}")
    spec = ModelSpec(**{field.name: stored[field.name] for field in fields(ModelSpec)})
    if not spec.classes or len(spec.palette) != len(spec.classes):
        raise ValueError(f"{len(spec.classes)} classes and {len(spec.palette)} colours")
    if any(len(colour) != 3 or not all(0 <= c <= 255 for c in colour) for colour in spec.palette):
        raise ValueError("palette: expected three numbers from 0 to 255 for each class")
    if len(spec.mean) != 3 or not all(map(math.isfinite, spec.mean)):
        raise ValueError(f"mean: expected three numbers, got {spec.mean}")
    if len(spec.std) != 3 or not all(0 < deviation < math.inf for deviation in spec.std):
        raise ValueError(f"std: expected three positive numbers, got {spec.std}")
    if abs(spec.ignore_index) >= 2**31:
        raise ValueError(f"ignore_index: {spec.ignore_index} is no label")
    for name, value in (spec.inference or {}).items():
        check_field(f"inference.{name}", value)
    return spec


def load_weights(model: nn.Module, file: Path) -> None:
    """Loads a weights file into a model of the same architecture.

    Raises:
        ValueError: names or shapes differ; the message names the first that does.
    """
    state = read_weights(file)
    check_shapes(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, file)
    load_state(model, state, file)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The state dict in a weights file. Raises ValueError if the file is damaged."""
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"checkpoint: {file} is damaged: {error}") from error


def read_shapes(file: Path) -> Shapes:
    """Names and shapes of the state dict in a weights file; errors as in `read_weights`."""
    try:
        with safetensors.safe_open(str(file), framework="pt") as stored:
            names = list(stored.keys())
            check_limit(
                "MAX_TENSORS", len(names), f"checkpoint: {file} holds {len(names):,} tensors"
            )
            return {name: tuple(stored.get_slice(name).get_shape()) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"checkpoint: {file} is damaged: {error}") from error


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], file: Path, *, strict: bool = True
) -> None:
    """As ``model.load_state_dict``, with an error that names the file."""
    try:
        model.load_state_dict(state, strict=strict)
    except RuntimeError as error:  # a dtype that cannot be converted
        raise ValueError(f"checkpoint: {file} cannot be loaded: {error}") from error


def check_names(model: nn.Module, stored: Shapes, file: Path) -> None:
    """Raises ValueError unless the tensors in ``file`` have a model's names."""
    own = model.state_dict()
    for what, names in (
        ("has no", sorted(own.keys() - stored.keys())),
        ("has an unknown", sorted(stored.keys() - own.keys())),
    ):
        if names:
            raise ValueError(
                f"checkpoint: {file} is of another architecture: it {what} {names[0]!r}"
                + and_more(len(names))
            )


def check_shapes(model: nn.Module, stored: Shapes, file: Path) -> None:
    """Raises ValueError unless the tensors in ``file`` have a model's names and shapes."""
    check_names(model, stored, file)
    own = model.state_dict()
    for name, shape in stored.items():
        if shape != tuple(own[name].shape):
            raise ValueError(
                f"checkpoint: {file} is of another architecture: {name!r} has shape "
                f"{shape}, the model's has {tuple(own[name].shape)}"
            )
