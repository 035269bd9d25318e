"""Gradient accumulation: the memory learns once per step of the optimiser, from all its passes.

A step's gradient may be computed in several forward and backward passes. accelerate knows which of
them is the last one before the optimiser's step, and so it does under transformers' Trainer; other
code says it by `more_passes`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mcibi_fast.nn.context import resize
from mcibi_fast.ops.recompute import recomputing

Passes = list[tuple[Tensor, Tensor]]  # features and labels of the passes before the last one

_more_to_come = False


@contextmanager
def more_passes(more: bool = True) -> Iterator[None]:
    """A forward pass within is followed by others before the optimiser's step, if ``more``.

    Only for gradient accumulation that is neither by accelerate nor by transformers::

        for i, (images, labels) in enumerate(parts):
            with more_passes(i < len(parts) - 1):
                loss = model(images, labels).loss / len(parts)
            loss.backward()
        optimizer.step()
    """
    global _more_to_come
    before, _more_to_come = _more_to_come, more
    try:
        yield
    finally:
        _more_to_come = before


def is_last_pass() -> bool:
    """Whether the optimiser's step follows this pass.

    True unless gradients are accumulated and further passes come first.
    """
    if _more_to_come:
        return False
    state = sys.modules.get("accelerate.state")
    return state is None or state.GradientState._shared_state.get("sync_gradients", True)


def whole_step(
    passes: Passes, features: Tensor, labels: Tensor, *, align_corners: bool = False
) -> tuple[Tensor, Tensor] | None:
    """What a memory's ``update`` should get after this pass, so that it learns once per step.

    Args:
        passes: a list that the caller keeps, empty at the beginning. It holds what the passes
            before the last one brought, and is emptied with the last one.
        features: R (B, Z, h, w) of this pass, without gradient.
        labels: (B, H, W).
        align_corners: of the memory.

    Returns:
        Features and labels of all passes of the step as one batch; None before its last pass. Maps
        of different sizes are upsampled to their labels' and returned as one row of pixels.
    """
    if not is_last_pass():
        # Activation checkpointing would count the pass twice; a compiled graph does not.
        if torch.compiler.is_compiling() or not recomputing():
            passes.append((features, labels))
        return None
    if not passes:
        return features, labels
    together = [*passes, (features, labels)]
    passes.clear()
    if len({(R.shape[1:], y.shape[1:]) for R, y in together}) > 1:
        together = [
            (
                resize(R, y.shape[1:], align_corners).transpose(0, 1).flatten(1)[None, :, None],
                y.flatten()[None, None],
            )
            for R, y in together
        ]
        return torch.cat([R for R, _ in together], 3), torch.cat([y for _, y in together], 2)
    return torch.cat([R for R, _ in together]), torch.cat([y for _, y in together])
