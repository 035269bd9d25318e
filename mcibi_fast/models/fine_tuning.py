"""Fine-tuning: a new model begins with the weights of a trained one, as far as they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mcibi_fast.models.backbones import Pretrained
from mcibi_fast.models.weights import find_weights, load_state, read_spec, read_weights

_BACKBONE = "backbone."
_SHOWN = 4  # modules that a message names


@dataclass(frozen=True)
class Beginning:
    """What a model took over from a checkpoint.

    Attributes:
        file: the weights file.
        taken: number of entries of the state dict that were taken over.
        fresh: names of the model's modules that kept their fresh weights.
        unused: names of the checkpoint's modules of which nothing was taken over.
    """

    file: Path
    taken: int
    fresh: Sequence[str]
    unused: Sequence[str]

    def __str__(self) -> str:
        parts = [f"begins with {self.taken} tensors of {self.file}"]
        for what, names in (("fresh", self.fresh), ("not used", self.unused)):
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                parts.append(f"{what}: {', '.join(names[:_SHOWN])}{more}")
        return "; ".join(parts)


def begin_with(model: nn.Module, checkpoint: str | Path) -> Beginning:
    """Loads into a model what fits of a checkpoint of this package, usually of another model.

    The whole backbone has to fit. In the head a module takes over its weights and buffers if all
    have the same names and shapes in both, and otherwise keeps its own: with another number of
    classes the classifiers and the memory, and with another framework or memory what the
    checkpoint does not have.

    Args:
        model: a segmentation model.
        checkpoint: a run's directory, or a weights file of this package.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is not a checkpoint of this package, is damaged, or has another backbone.
    """
    file = find_weights(checkpoint)
    spec = read_spec(file)  # a clear error for other files
    return take_what_fits(model, read_weights(file), file, spec.backbone)


@torch.no_grad()
def take_what_fits(
    model: nn.Module, stored: Mapping[str, Tensor], file: Path, backbone: str
) -> Beginning:
    """The same with the state dict that was read from ``file``, of a model with ``backbone``."""
    theirs, ours = _modules(stored), _modules(model.state_dict())
    fitting = [name for name in ours if _fits(ours[name], theirs.get(name, {}))]
    if missing := [n for n in ours if f"{n}.".startswith(_BACKBONE) and n not in fitting]:
        raise ValueError(
            f"pretrained: {file} has another backbone, {backbone}: {missing[0]} does not fit"
        )
    taken = [entry for name in fitting for entry in ours[name]]
    load_state(model, {entry: stored[entry] for entry in taken}, file, strict=False)
    return Beginning(
        file=file,
        taken=len(taken),
        fresh=tuple(name for name in ours if name not in fitting),
        unused=tuple(name for name in theirs if name not in fitting),
    )


def _modules(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The entries of a state dict by the module that they belong to."""
    modules: dict[str, dict[str, Tensor]] = {}
    for entry, value in state.items():
        modules.setdefault(entry.rpartition(".")[0], {})[entry] = value
    return modules


def _fits(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> bool:
    return own.keys() == stored.keys() and all(
        value.shape == stored[entry].shape for entry, value in own.items()
    )


def own_checkpoint(pretrained: Pretrained) -> Path | None:
    """The path, if it is a checkpoint of this package; None for weights of a backbone."""
    if isinstance(pretrained, bool):
        return None
    path = Path(pretrained)
    if path.is_dir():
        return path
    try:
        read_spec(path)
    except (ValueError, OSError):
        return None
    return path
