"""Activation checkpointing: training keeps fewer activations and computes them again backwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mcibi_fast.ops.recompute import recomputing
from mcibi_fast.terminal import printable


class Checkpointed(nn.Module):
    """A module that computes parts of itself twice while training, if it is told to.

    Attributes:
        gradient_checkpointing: whether it does.
    """

    gradient_checkpointing: bool = False

    def _run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """``function(*inputs)``, whose activations are not kept in training."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


def set_checkpointing(backbone: nn.Module, head: Checkpointed, enable: bool) -> None:
    """Switches checkpointing of a model's parts on or off.

    Batch norms take part in the recomputation without counting a batch twice in their running
    statistics. A backbone that has no ``set_grad_checkpointing``, which timm's have, stays as it
    is, with a warning.
    """
    head.gradient_checkpointing = enable
    body: Any = getattr(backbone, "body", backbone)
    try:
        body.set_grad_checkpointing(enable)
    except (AttributeError, AssertionError):  # timm asserts that it was not asked for in vain
        if enable:
            warnings.warn(
                printable(
                    f"gradient_checkpointing: {type(body).__name__} cannot do it; the backbone "
                    "keeps its activations, the head does not"
                ),
                stacklevel=3,
            )
    for module in (*backbone.modules(), *head.modules()):
        if isinstance(module, _BatchNorm):
            _set_hooks(module, enable)


def _set_hooks(norm: _BatchNorm, enable: bool) -> None:
    for hooks, hook in (
        (norm._forward_pre_hooks, _hold_statistics),
        (norm._forward_hooks, _release_statistics),
    ):
        for number in [n for n, other in hooks.items() if other is hook]:
            del hooks[number]
            norm._forward_hooks_always_called.pop(number, None)
    if enable:
        norm.register_forward_pre_hook(_hold_statistics)
        norm.register_forward_hook(_release_statistics, always_call=True)


def _hold_statistics(norm: Any, _inputs: Any) -> None:
    # A compiler leaves repeated updates out by itself.
    if not torch.compiler.is_compiling() and norm.training and recomputing():
        norm.held_statistics = dict(norm._buffers)
        for name, buffer in norm.named_buffers(recurse=False):
            norm._buffers[name] = buffer.clone()  # it is this that the batch will change


def _release_statistics(norm: Any, _inputs: Any, _output: Any) -> None:
    if not torch.compiler.is_compiling():
        norm._buffers.update(norm.__dict__.pop("held_statistics", {}))
