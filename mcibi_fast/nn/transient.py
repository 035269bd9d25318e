"""Tensors of a module that are in no state dict and keep their values however it is loaded.

PyTorch keeps such tensors as buffers with ``persistent=False``. Those lose their values wherever a
model is built without memory and then filled from a state dict: on the meta device followed by
``to_empty``, by ``from_pretrained`` of transformers, under ``init_empty_weights`` of accelerate, or
for FSDP. The tensors here are plain attributes, which have values from the start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class TransientTensors(nn.Module):
    """A module with tensors outside its state dict; they move with it and keep their dtype."""

    def __init__(self) -> None:
        super().__init__()
        self._transient: tuple[str, ...] = ()

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        """Keeps a tensor, which should be made with ``device="cpu"``, under this name."""
        if name not in self._transient:
            self._transient += (name,)
        self.__dict__[_key(name)] = tensor

    def _held(self, name: str, device: torch.device) -> Any:
        """The tensor itself, on this device; None if that was kept."""
        tensor: Tensor | None = self.__dict__[_key(name)]
        if tensor is None or tensor.device == device:
            return tensor
        # A loader may have put the other tensors there one by one.
        with torch.inference_mode(False):
            moved = tensor.to(device)
        if device.type != "meta" and not torch.compiler.is_exporting():
            self.__dict__[_key(name)] = moved
        return moved

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TransientTensors:
        super()._apply(fn, recurse)
        device = fn(torch.empty(1, device="cpu")).device
        if device.type != "meta":
            for name in self._transient:
                self._held(name, device)
        return self


def _key(name: str) -> str:
    return f"_transient_{name}"


def states(model: nn.Module) -> list[Tensor]:
    """All tensors that training changes besides the parameters: buffers and transient tensors."""
    return [*model.buffers(), *transient_tensors(model).values()]


def transient_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All tensors that the model keeps outside its state dict, by name, without other modules'
    non-persistent buffers.
    """
    return {
        f"{prefix}.{name}".lstrip("."): tensor
        for prefix, module in model.named_modules()
        if isinstance(module, TransientTensors)
        for name in module._transient
        if (tensor := module.__dict__[_key(name)]) is not None
    }
