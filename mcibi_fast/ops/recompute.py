"""Activation checkpointing of what reads a memory: computed again, it sees the same memory.

``torch.utils.checkpoint`` runs a function again in the backward pass, after a training step has
updated the memory. Without care the gradients would be those of another memory, and an update
inside the function would happen twice. What a checkpointed call reads is therefore kept with it,
and what it has updated is not updated again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType, GeneratorType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mcibi_fast.ops.dispatch import Kernel, Op, always

_KEPT = "_mcibi_fast_kept"  # attribute of a checkpointed call: what it read and updated
_FILES = ("torch/utils/checkpoint.py", "torch/_functorch/_aot_autograd/runtime_wrappers.py")
_read = WeakTensorKeyDictionary()  # states: the version that a forward read last


def remembered(state: Tensor, *, after_update: bool = False) -> Tensor:
    """A copy of a state; in the recomputation of a checkpointed call the one of its forward.

    Args:
        state: a tensor without gradient that training updates in place between forward and
            backward, always the same one.
        after_update: it is read after the update of the step.

    Raises:
        RuntimeError: the state has changed since the forward, and it is not known how the forward
            read it.
    """
    return (_remember if _has_values(state) else REMEMBERED)(state, after_update)


def once(new: Tensor, state: Tensor) -> Tensor:
    """What an update stores in ``state``: ``new``, or in a recomputation what it already holds."""
    return (_once if _has_values(state) else ONCE)(new, state)


def recomputing() -> bool:
    """Whether this is the recomputation of a checkpointed call, in the backward pass."""
    return _in_backward() and next(_calls(), None) is not None


def _has_values(state: Tensor) -> bool:
    """False while a graph is traced or transformed, in which an operator has to stand for the call
    until the graph runs.
    """
    plain = type(state) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(state)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _calls() -> Iterator[Any]:
    """The checkpointed calls that run now, innermost first: the objects that live until backward.

    They are found among the variables of PyTorch's frames on the stack: those of
    ``torch.utils.checkpoint``, and those of compiled graphs, which recompute by themselves.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_FILES):
            call = _call_of(frame)
            if call is not None:
                yield call
        frame = frame.f_back


def _call_of(frame: FrameType) -> Any:
    name, variables = frame.f_code.co_name, frame.f_locals
    if name in ("forward", "backward"):  # use_reentrant=True, or a compiled graph
        return variables.get("ctx")
    if name == "unpack_hook":  # use_reentrant=False, in the backward
        return variables.get("frame")
    generator = variables.get("gen")  # use_reentrant=False, in the forward
    while isinstance(generator, GeneratorType):
        if generator.gi_frame is not None and "new_frame" in generator.gi_frame.f_locals:
            return generator.gi_frame.f_locals["new_frame"]
        generator = generator.gi_yieldfrom
    return None


def _kept_by(call: Any) -> dict[Any, Any]:
    if not hasattr(call, _KEPT):
        setattr(call, _KEPT, {})
    return getattr(call, _KEPT)


def _remember(state: Tensor, after_update: bool) -> Tensor:
    key, in_backward, calls = (state.data_ptr(), after_update), _in_backward(), list(_calls())
    found = next((_kept_by(c)[key] for c in calls if key in _kept_by(c)), None)
    if in_backward and found is not None:
        version, kept = found
        if version is None:
            raise RuntimeError(
                "memory: a checkpointed function read it both before and after its update, and "
                "cannot be computed again; checkpoint the two parts separately"
            )
    else:
        version, kept = state._version, state.clone()
        if in_backward and not calls and _read.get(state, version) != version:
            raise RuntimeError(
                "memory: it was updated between the forward and this recomputation in the backward "
                "pass, which therefore differ; checkpoint with torch.utils.checkpoint, or call "
                "update after the backward pass"
            )
        if not in_backward:
            _read[state] = version
            if found is not None and found[0] != version:
                version = None
    for call in calls:
        _kept_by(call).setdefault(key, (version, kept))
        if version is None:
            _kept_by(call)[key] = (None, kept)
    return kept.clone()


def _once(new: Tensor, state: Tensor) -> Tensor:
    key, calls = (state.data_ptr(), "updated"), list(_calls())
    if _in_backward() and any(key in _kept_by(call) for call in calls):
        return state.clone()
    for call in calls:
        _kept_by(call)[key] = True
    return new.clone()


def _like_state(state: Tensor, _after_update: bool) -> Tensor:
    return torch.empty_like(state)


REMEMBERED = Op("remembered", [Kernel("reference", _remember, always)], _like_state)
REMEMBERED.without_gradient(lambda state, after_update: state.clone())
ONCE = Op("once", [Kernel("reference", _once, always)], lambda new, state: torch.empty_like(new))
ONCE.without_gradient(lambda new, state: new.clone())
