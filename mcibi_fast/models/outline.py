"""A model without memory for its weights, to compare what a file asks for with what it holds.

The options in a file may ask for a model of any size. Before it is made, it is made on PyTorch's
meta device, where tensors have shapes and nothing else, and must have the shapes in the file: so no
model is larger than its file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

TRANSIENT_BYTES = 2**30
"""Of the tensors that a model makes by itself and that are in no file, such as positions."""
PARAMETERS = 20
"""Parameters that may be registered while a model is made, for each tensor that its file holds."""


class Unbuildable(ValueError):
    """No model has the sizes that a file asks for, or only one that is larger than the file."""


_SPARE = 10_000  # of them: some backbones make layers that they then leave out
_Model = TypeVar("_Model", bound=nn.Module)
# timm reads numbers from it as it builds; as many as a network has blocks.
_WITH_VALUES = (torch.linspace,)
_DRAWN = (torch.rand, torch.randn, torch.randint, torch.randperm)


def outline(create: Callable[[], _Model], stored: int) -> _Model:
    """The model on the meta device; draws nothing from any random generator.

    Args:
        create: makes it.
        stored: tensors in the file that it is to be compared with.

    Raises:
        Unbuildable: it would be larger than a file with so many tensors can be, or no tensors have
            such sizes.
        ValueError, TypeError: as ``create``.
    """
    most = PARAMETERS * stored + _SPARE
    try:
        with warnings.catch_warnings(), torch.device("meta"), _Everywhere(), _at_most(most):
            warnings.simplefilter("ignore")  # of tensors without values; the real ones come again
            model = create()
    except (ValueError, TypeError, ImportError):
        raise
    except Exception as error:  # what sizes that make no sense lead to
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Unbuildable(f"no model has such sizes: {lines[0]}") from error
    persistent = model.state_dict(keep_vars=True).keys()
    transient = sum(
        buffer.numel() * buffer.element_size()
        for name, buffer in model.named_buffers()
        if name not in persistent
    )
    if transient > TRANSIENT_BYTES:
        raise Unbuildable(
            f"its options ask for {transient:,} bytes besides the weights, more than "
            f"outline.TRANSIENT_BYTES = {TRANSIENT_BYTES:,}"
        )
    return model


class _Everywhere(TorchFunctionMode):
    """Tensors that would be made on the CPU all the same are made on the meta device, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DRAWN:
            kwargs.pop("generator", None)
            kwargs["device"] = "meta"
        elif func in _WITH_VALUES:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stops a model that goes on and on."""
    left = count

    def register(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Unbuildable(
                f"its options ask for more than {count:,} parameters, outline.PARAMETERS = "
                f"{PARAMETERS} for each tensor in the file"
            )

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()
