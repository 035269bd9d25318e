"""Builds a model without memory for its weights, to compare its size with that of its file.

The options in a file may ask for a model of any size. So the model is first built on PyTorch's meta
device, where tensors have shapes but no values, and its shapes must be those in the file: no model
is larger than its file.
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

from mcibi_fast.limits import check_limit
from mcibi_fast.nn.transient import transient_tensors


class Unbuildable(ValueError):
    """No model has the sizes that a file asks for, or only one that is larger than the file."""


_SPARE = 10_000  # further parameters: some backbones create layers that they then leave out
_Model = TypeVar("_Model", bound=nn.Module)
# timm reads the numbers of this small tensor (one per block) while it builds a model.
_WITH_VALUES = (torch.linspace,)
_DRAWN = (torch.rand, torch.randn, torch.randint, torch.randperm)


def outline(create: Callable[[], _Model], stored: int) -> _Model:
    """The model on the meta device; nothing is drawn from any random generator.

    Args:
        create: builds the model.
        stored: number of tensors in the file with which it will be compared.

    Raises:
        Unbuildable: it would be larger than a file with so many tensors can be, or no tensors have
            such sizes.
        ValueError, TypeError: as ``create``.
    """
    try:
        with warnings.catch_warnings(), torch.device("meta"), _Everywhere(), _at_most(stored):
            warnings.simplefilter("ignore")  # of tensors without values; the real ones come again
            model = create()
    except (ValueError, TypeError, ImportError):
        raise
    except Exception as error:  # impossible sizes can raise any error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Unbuildable(f"no model has such sizes: {lines[0]}") from error
    persistent = model.state_dict(keep_vars=True).keys()
    transient = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in [*model.named_buffers(), *transient_tensors(model).items()]
        if name not in persistent
    )
    check_limit(
        "MAX_TRANSIENT_BYTES",
        transient,
        f"its options ask for {transient:,} bytes besides the weights",
        Unbuildable,
    )
    return model


class _Everywhere(TorchFunctionMode):
    """Moves to the meta device also the tensors that would be created on the CPU in spite of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DRAWN:
            kwargs.pop("generator", None)
            kwargs["device"] = "meta"
        elif func in _WITH_VALUES:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def _at_most(stored: int) -> Iterator[None]:
    """Raises once too many parameters are registered for a file with ``stored`` tensors."""
    count = -_SPARE

    def register(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal count
        count += 1
        check_limit(
            "MAX_PARAMETERS",
            count / max(stored, 1),
            f"its options ask for {count + _SPARE:,} parameters or more for {stored:,} tensors",
            Unbuildable,
        )

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()
