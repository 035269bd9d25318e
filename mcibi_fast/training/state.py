"""Random and transient state that a resumed run needs to continue bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mcibi_fast.nn.transient import transient_tensors
from mcibi_fast.untrusted import shorten


def seed_global_generators(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators.

    Only commands call it, once, before anything is built: apart from initial weights and dropout,
    no library code of this package draws from the global generators, and none seeds them.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The global generators' states, as tensors and plain numbers."""
    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state()  # noqa: NPY002
    name, keys, position, has_gauss, cached = legacy
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    keys = keys.numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))  # noqa: NPY002


def restore_random_states(
    states: list[dict[str, Any]], accelerator: Accelerator, report: Callable[[str], None]
) -> None:
    """Puts back this process's state of those that all processes of the run had.

    With another number of processes than then it only reports so.
    """
    if len(states) == accelerator.num_processes:
        restore_random_state(states[accelerator.process_index])
    else:
        report(
            f"resume: {len(states)} processes wrote the checkpoint, now there are "
            f"{accelerator.num_processes}: dropout continues with other random numbers"
        )


def transient_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that are not part of the weights, by name, among them Philox (seed, step) states.

    A resumed run needs them.
    """
    persistent = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name not in persistent}
    return buffers | transient_tensors(model)


def restore_transient_buffers(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Puts back what `transient_buffers` returned.

    Raises:
        ValueError: the model's transient buffers are not those that were saved.
    """
    buffers = transient_buffers(model)
    if buffers.keys() != saved.keys():
        odd = sorted(buffers.keys() ^ saved.keys())
        raise ValueError(f"training state: the model's transient buffers differ: {', '.join(odd)}")
    for name, buffer in buffers.items():
        buffer.copy_(saved[name])


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Puts back an optimiser's state dict, except for which kernels it uses.

    Raises:
        ValueError: its settings or tensors do not belong to this optimiser.
    """
    groups = zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
    for own, other in groups:
        other["fused"] = own["fused"]  # the device may be another one
        for name in own.keys() & other.keys():
            if _kind(own[name]) != _kind(other[name]):
                raise ValueError(f"the optimizer's {name} is a {type(other[name]).__name__}")
    optimizer.load_state_dict(saved)
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape not in (parameter.shape, ()):
                raise ValueError(f"the optimizer's {name} has shape {tuple(value.shape)}")


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)


_FOREIGN = (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def refusing(run: Path) -> Iterator[None]:
    """Turns the many errors of torch and NumPy for a wrong or damaged state into one kind.

    Raises:
        ValueError: instead of them; the message names the run.
    """
    try:
        yield
    except _FOREIGN as error:
        raise ValueError(
            f"resume: the training state of {run} is damaged or of another run: {shorten(error)}"
        ) from error
