"""In which precision a trained model is evaluated: that of its training, unless told otherwise."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from mcibi_fast.models import Segmentor
from mcibi_fast.models.weights import Precision

if TYPE_CHECKING:
    from accelerate import Accelerator

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precision_of(
    model: Segmentor,
    device: torch.device,
    wanted: Precision | None = None,
    accelerator: Accelerator | None = None,
) -> Precision:
    """The precision for a model on this device.

    Args:
        model: a model, or something that is called as one.
        device: the model's.
        wanted: what was asked for.
        accelerator: its mixed precision comes next; then that of the model's training.

    Returns:
        "no", "bf16" or "fp16"; "no" instead of "fp16" on a CPU, which computes nothing in it.

    Raises:
        ValueError: ``wanted`` is none of these.
    """
    if wanted not in (None, "no", *_DTYPES):
        raise ValueError(f"precision: expected 'no', 'bf16' or 'fp16', got {wanted!r}")
    own: Any = getattr(model, "precision", "no")
    if accelerator is not None and mixed_precision_of(accelerator) != "no":
        own = mixed_precision_of(accelerator)
    found: Precision = own if wanted is None else wanted
    return "no" if found == "fp16" and device.type == "cpu" else found


def mixed_precision_of(accelerator: Accelerator) -> Precision:
    """The accelerator's own; "no" for kinds that PyTorch's autocast does not have."""
    found: Any = getattr(accelerator, "mixed_precision", "no")
    return found if found in _DTYPES else "no"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """The context in which a model computes in this precision."""
    if precision == "no":
        return nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


def in_words(precision: Precision) -> str:
    """The precision, as it is printed with results."""
    return "full precision" if precision == "no" else f"mixed precision {precision}"
