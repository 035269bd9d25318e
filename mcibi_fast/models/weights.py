"""Weights files: safetensors with the model's specification in their header."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
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
    """

    name: str
    backbone: str
    options: dict[str, Any]
    classes: list[str]
    palette: list[list[int]]
    mean: list[float]
    std: list[float]
    ignore_index: int = 255


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
        ValueError: the file was not written by this package.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        stored = json.loads(metadata[_METADATA_KEY])
        return ModelSpec(**{field.name: stored[field.name] for field in fields(ModelSpec)})
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint: {path} is not a checkpoint of mcibi_fast (a safetensors file that "
            "`mcibi-fast train` wrote)"
        ) from error


def load_weights(model: nn.Module, file: Path) -> None:
    """Loads a weights file into a model of the same architecture.

    Raises:
        ValueError: names or shapes differ; the message names the first that does.
    """
    fit_weights(model, read_weights(file), file)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The state dict in a weights file. Raises ValueError if the file is damaged."""
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"checkpoint: {file} is damaged: {error}") from error


def fit_weights(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Loads a state dict that was read from ``file``; raises errors as `load_weights` does."""
    own = model.state_dict()
    for what, names in (
        ("has no", sorted(own.keys() - state.keys())),
        ("has an unknown", sorted(state.keys() - own.keys())),
    ):
        if names:
            raise ValueError(
                f"checkpoint: {file} is of another architecture: it {what} {names[0]!r}"
                + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
            )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"checkpoint: {file} is of another architecture: {name!r} has shape "
                f"{tuple(tensor.shape)}, the model's has {tuple(own[name].shape)}"
            )
    model.load_state_dict(state)
