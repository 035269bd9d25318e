"""The files of a run that are fuzzed: its configuration, history, weights and training state."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mcibi_fast.models.checkpoint import load_model
from mcibi_fast.models.weights import WEIGHTS
from mcibi_fast.recipes import FolderData, ModelConfig, TrainConfig
from mcibi_fast.recipes.registry import RECIPES
from mcibi_fast.training.run import STATE, Run
from mcibi_fast.training.state import (
    random_state,
    refusing,
    restore_optimizer,
    restore_random_state,
    restore_transient_buffers,
    transient_buffers,
)
from tests.security import places
from tests.security.fuzz import Kind

REFUSED = (ValueError, OSError)  # what the readers of a run raise


def configs() -> Sequence[bytes]:
    recipes = [TrainConfig(FolderData("data"), ModelConfig()), RECIPES["ade20k"]()]
    return [json.dumps(recipe.to_dict()).encode() for recipe in recipes]


def read_config(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    Run(folder).settings()


def histories() -> Sequence[bytes]:
    lines = [
        {"step": 1, "epoch": 1, "lr": 0.1, "loss": 2.5, "losses": {"a": 1.5, "b": 1.0}},
        {"step": 2, "memory": {"mean": [0.5, 1.5], "std": [1.0, 2.0]}},
        {"step": 2, "metrics": {"mean_iou": 0.5, "classes": [{"class": "sky", "iou": None}]}},
    ]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


def read_history(content: bytes, folder: Path) -> None:
    (folder / "history.jsonl").write_bytes(content)
    Run(folder).history()


@functools.cache
def weights() -> Sequence[bytes]:
    with tempfile.TemporaryDirectory() as top:
        return [places.checkpoint(Path(top) / WEIGHTS).read_bytes()]


def read_weights(content: bytes, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(content)
    load_model(folder / WEIGHTS)


def model() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))


def optimizer_of(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)


@functools.cache
def states() -> Sequence[bytes]:
    network = model()
    optimizer = optimizer_of(network)
    network(torch.ones(2, 3, 2, 2)).sum().backward()
    optimizer.step()
    state: dict[str, Any] = {
        "step": 1,
        "seconds": 2.5,
        "weights": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "transient_buffers": transient_buffers(network),
        "random": [random_state()],
    }
    found = []
    for in_zip in (True, False):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=in_zip)
        found.append(buffer.getvalue())
    return found


def read_state(content: bytes, folder: Path) -> None:
    """As a resumed training reads it."""
    at = folder / "checkpoints" / "last"
    at.mkdir(parents=True)
    (at / WEIGHTS).write_bytes(b"")
    (at / STATE).write_bytes(content)
    _, state = Run(folder).load_state()
    network = model()
    with refusing(folder):
        network.load_state_dict(state["weights"])
        restore_transient_buffers(network, state["transient_buffers"])
        restore_optimizer(optimizer_of(network), state["optimizer"])
        restore_random_state(state["random"][0])


def of_run(seeds: Callable[[], Sequence[bytes]], read: Callable[[bytes, Path], object]) -> Kind:
    return Kind(seeds, read, errors=REFUSED)


RUN_KINDS: dict[str, Kind] = {
    "config": of_run(configs, read_config),
    "history": of_run(histories, read_history),
    "weights": of_run(weights, read_weights),
    "state": of_run(states, read_state),
}
