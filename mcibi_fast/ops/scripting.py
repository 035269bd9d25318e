"""A clear error from ``torch.jit.script``, which would name a line inside an op or a module."""

from __future__ import annotations

from typing import Any

from torch import nn


def refuse_scripting(*items: Any) -> None:
    """Lets ``torch.jit.script`` raise RuntimeError for these functions and classes of modules."""
    for item in items:
        message = (
            f"{item.__name__} of mcibi_fast cannot be scripted; use torch.export.export or "
            "torch.compile"
        )
        if isinstance(item, type):
            item.__prepare_scriptable__ = _refuse(message)  # type: ignore[attr-defined]
        else:
            item.__script_unsupported = message


def _refuse(message: str) -> Any:
    def prepare(module: nn.Module) -> nn.Module:
        raise RuntimeError(f"TorchScript error: {message}")

    return prepare
