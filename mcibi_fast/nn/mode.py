"""The mode of a model, training or evaluation, for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode in the block; then every module is in its own mode again.

    ``model.train(was_training)`` alone would also switch the parts that had another mode than the
    model, such as a backbone whose batch norms are frozen.
    """
    before = [(module, module.training) for module in model.modules()]
    was_training = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(was_training)  # some modules do more than set the flag
        for module, mode in before:
            module.training = mode
